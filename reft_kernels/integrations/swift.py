"""The tuner ``reft_kernels`` for ms-swift, based on the PEFT tuner of this package.

With ms-swift 4::

    swift sft --external_plugins PATH/reft_kernels/integrations/swift.py \\
        --tuner_type reft_kernels --reft_rank 8 ...

ms-swift 3 imports plugins by file name, and this file has the name of the package ``swift``.
Therefore create a plugin file, and use ``--train_type``::

    echo "import reft_kernels.integrations.swift" > reft_plugin.py
    swift sft --external_plugins reft_plugin.py --train_type reft_kernels --reft_rank 8 ...

The tuner uses ms-swift's arguments ``reft_rank``, ``reft_layers`` (default: all),
``reft_layer_key``, ``reft_intervention_type`` and ``reft_args``. The last is a JSON object with
pyreft's ``dropout``, ``act_fn`` and ``add_bias``, and with the fields positions, share_weights,
component, activation, parametrization, init, embed_dim and intervention of
:class:`~reft_kernels.integrations.peft.ReftConfig`. The default positions are the paper's "f7+l7".
ms-swift's own ReFT passes no positions and edits every token; use ``{"positions": "all"}`` for
that.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

if not __name__.startswith("reft_kernels."):
    # ms-swift puts the folder of a plugin first on the path, where this package's peft and swift
    # would hide the packages of these names
    sys.path[:] = [
        entry for entry in sys.path if entry != os.path.dirname(os.path.abspath(__file__))
    ]

import torch
from peft import PeftModel, TaskType, get_peft_model
from torch import Tensor, nn

from reft_kernels.integrations.peft import ReftConfig
from reft_kernels.interventions import STACKED
from reft_kernels.model import EXPLICIT
from reft_kernels.positions import IGNORED_LABEL, prompt_lengths_from_labels

NAME = "reft_kernels"
"""Name of the tuner, for ``--tuner_type`` (ms-swift 4) or ``--train_type`` (ms-swift 3)."""

OPTIONS = (
    "positions",
    "share_weights",
    "component",
    "activation",
    "dropout",
    "parametrization",
    "init",
    "embed_dim",
)
_REGISTRIES = (("swift.tuner_plugin", "tuners_map"), ("swift.plugin", "extra_tuners"))


def _options(reft_args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Parse and check the argument ``reft_args``."""
    if isinstance(reft_args, str) and reft_args.strip():
        try:
            reft_args = json.loads(reft_args)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"reft_args: got {reft_args!r}, expected a JSON object ({error})"
            ) from None
    if not reft_args:
        return {}
    if not isinstance(reft_args, Mapping):
        raise ValueError(f"reft_args: got {reft_args!r}, expected a JSON object")
    known = (*OPTIONS, "intervention", "act_fn", "add_bias")
    foreign = sorted(set(reft_args) - set(known))
    if foreign:
        raise ValueError(
            f"reft_args: got {', '.join(foreign)}, expected names among {', '.join(known)}"
        )
    if "act_fn" in reft_args and "activation" in reft_args:
        raise ValueError("reft_args: got both act_fn and activation, expected one of them")
    return dict(reft_args)


def _intervention(args: Any, options: dict[str, Any]) -> str:
    kind = (
        options.pop("intervention", None)
        or getattr(args, "reft_intervention_type", None)
        or "loreft"
    )
    name = str(kind).lower().removesuffix("intervention")
    if name not in STACKED:
        raise ValueError(
            f"reft_intervention_type: got {kind!r}, expected one of {', '.join(STACKED)}, with or "
            "without Intervention"
        )
    return name


def _component(args: Any, options: dict[str, Any]) -> str:
    key = getattr(args, "reft_layer_key", None)
    if key is None:
        return options.pop("component", "block_output")
    if "component" in options:
        raise ValueError(
            f"reft_layer_key: got {key!r} beside reft_args' component {options['component']!r}, "
            "expected one of them"
        )
    return f"{key}.{{layer}}"


def _modules_to_save(args: Any) -> list[str] | None:
    modules = list(getattr(args, "modules_to_save", None) or [])
    groups = [name for name in modules if name.startswith("all-")]
    if groups:
        raise ValueError(f"modules_to_save: got {', '.join(groups)}, expected the names of modules")
    return modules or None


def reft_config(args: Any) -> ReftConfig:
    """Return the PEFT configuration for ms-swift's arguments.

    Args:
        args: An object with the attributes of ms-swift's ``SftArguments``. Missing attributes have
            ms-swift's defaults.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has an invalid value.
    """
    options = _options(getattr(args, "reft_args", None))
    intervention, component = _intervention(args, options), _component(args, options)
    if "act_fn" in options:
        options["activation"] = options.pop("act_fn")
    biased = options.pop("add_bias", False)
    layers = getattr(args, "reft_layers", None)
    task = str(getattr(args, "task_type", None) or "").upper()
    config = ReftConfig(
        layers=list(layers) if layers else "all",
        rank=getattr(args, "reft_rank", 4),
        intervention=intervention,
        component=component,
        init=options.pop("init", None),
        modules_to_save=_modules_to_save(args),
        task_type=task if task in TaskType.__members__ else None,
        **options,
    )
    if biased and intervention == "noreft" and config.activation != "linear":
        raise ValueError(
            f"reft_args: got add_bias and act_fn {config.activation!r}, expected add_bias=false: "
            "b cannot hold the bias of W2 h"
        )
    return config


# ---- Prompts


def _supervised(labels: Tensor, logits_to_keep: int | Tensor, batch: int, width: int) -> Tensor:
    """Return which tokens have a label, from labels truncated by ``logits_to_keep``.

    Args:
        labels: ``[B, K]``.
        logits_to_keep: K, or for one example a bool tensor ``[T]``.
        batch: B.
        width: T.

    Returns:
        bool ``[B, T]``.
    """
    supervised = torch.zeros(batch, width, dtype=torch.bool, device=labels.device)
    if isinstance(logits_to_keep, Tensor):
        # The kept logits are those before a token with a label, and the last one
        supervised[:, 1:] = logits_to_keep[:-1].to(labels.device)
    else:
        supervised[:, width - labels.shape[1] :] = labels != IGNORED_LABEL
    return supervised


def _packed_lengths(supervised: Tensor, position_ids: Tensor) -> Tensor:
    """Return the prompt lengths of packed sequences, each of which starts at position 0."""
    position, labelled = (
        position_ids.reshape(-1).to(supervised.device),
        supervised.reshape(-1).to(torch.int64),
    )
    sequence = (position == 0).cumsum(0) - 1
    running = labelled.cumsum(0)
    start = torch.arange(position.shape[0], device=position.device) - position
    prompt = (running == (running - labelled)[start]).to(torch.int64)
    return torch.zeros(int(sequence[-1]) + 1, dtype=torch.int64, device=position.device).index_add_(
        0, sequence, prompt
    )


def _keep_prompts(
    module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook that adds ``prompt_lengths`` if ms-swift has truncated the labels.

    ms-swift truncates them with ``logits_to_keep``, which is enabled by default.
    """
    labels, logits_to_keep = kwargs.get("labels"), kwargs.get("logits_to_keep")
    tokens = (
        kwargs.get("input_ids")
        if kwargs.get("input_ids") is not None
        else kwargs.get("inputs_embeds")
    )
    if (
        logits_to_keep is None
        or not isinstance(labels, Tensor)
        or not isinstance(tokens, Tensor)
        or any(n in kwargs for n in EXPLICIT)
    ):
        return None
    batch, width = tokens.shape[:2]
    if labels.shape == (batch, width):
        return None
    supervised = _supervised(labels, logits_to_keep, batch, width)
    mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is None and isinstance(position_ids, Tensor) and position_ids.shape == (batch, width):
        lengths = _packed_lengths(supervised, position_ids)
    else:
        padded = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        full = torch.where(supervised, 0, IGNORED_LABEL)
        lengths = prompt_lengths_from_labels(
            full, padded if padded is None else padded.to(full.device)
        )
    return args, {**kwargs, "prompt_lengths": lengths}


class _Called:
    """Replaces the ``forward`` of a tuner such that the model's hooks are called.

    PEFT before 0.21 calls the model's ``forward`` directly, without hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def _watched(model: PeftModel) -> PeftModel:
    inner = model.get_base_model()
    # Prepended, because the tuner's hook on the same module removes the explicit arguments
    inner.register_forward_pre_hook(_keep_prompts, with_kwargs=True, prepend=True)
    model.base_model.__dict__["forward"] = _Called(inner)  # ms-swift 4 requires PEFT before 0.21
    return model


# ---- The tuner


class ReftKernelsTuner:
    """Implementation of ms-swift's ``Tuner`` interface."""

    @staticmethod
    def prepare_model(args: Any, model: nn.Module) -> PeftModel:
        """Return the model with a new ReFT adapter; its other parameters are frozen.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument is invalid or does not fit the model, which is then
                unchanged.
        """
        return _watched(get_peft_model(model, reft_config(args)))

    @staticmethod
    def save_pretrained(
        model: PeftModel,
        save_directory: str,
        state_dict: dict[str, Tensor] | None = None,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """Save the adapter.

        Args:
            model: The model with the adapter.
            save_directory: The folder to write.
            state_dict: The weights, if a training engine has gathered them; else those of the
                model.
            safe_serialization: Whether to write safetensors.
            **kwargs: Passed to ``PeftModel.save_pretrained``.
        """
        kwargs.setdefault("selected_adapters", ["default"])
        if state_dict is not None:
            kwargs["state_dict"] = state_dict
        model.save_pretrained(save_directory, safe_serialization=safe_serialization, **kwargs)

    @staticmethod
    def from_pretrained(model: nn.Module, model_id: str, **kwargs: Any) -> PeftModel:
        """Return the model with a saved adapter; pass ``is_trainable=True`` to train it."""
        return _watched(PeftModel.from_pretrained(model, model_id, **kwargs))


def register(registry: MutableMapping[str, type] | None = None) -> None:
    """Register the tuner.

    Args:
        registry: ms-swift's registry. If None, it is ``swift.tuner_plugin.tuners_map`` (ms-swift 4)
            or ``swift.plugin.extra_tuners`` (ms-swift 3).

    Raises:
        ImportError: If ms-swift is not installed or has another tuner with this name.
    """
    registry = _find_registry() if registry is None else registry
    if registry is None:
        raise ImportError(
            "ms-swift: neither swift.tuner_plugin nor swift.plugin is there; pip install ms-swift"
        )
    known = registry.get(NAME)
    if known is not None and known.__qualname__ != ReftKernelsTuner.__qualname__:
        raise ImportError(
            f"ms-swift has another tuner called {NAME!r} ({known.__module__}); reft_kernels "
            "cannot register its own"
        )
    registry[NAME] = ReftKernelsTuner


def _find_registry() -> MutableMapping[str, type] | None:
    """Return ms-swift's registry of tuners, or None if ms-swift is not installed."""
    for path, name in _REGISTRIES:
        try:
            return getattr(importlib.import_module(path), name)
        except ModuleNotFoundError as error:
            if error.name not in ("swift", path):  # a dependency of ms-swift is missing
                raise
    return None


_registry = _find_registry()
if _registry is not None:
    register(_registry)
