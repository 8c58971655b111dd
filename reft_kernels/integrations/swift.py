"""ReFT in ms-swift: the tuner ``reft_kernels``, built on the PEFT tuner.

ms-swift 4:  swift sft --external_plugins PATH/reft_kernels/integrations/swift.py --tuner_type
             reft_kernels --reft_rank 8 ...
ms-swift 3:  the same with ``--train_type`` and a plugin file of one's own, since 3.x imports
             plugins by file name, and this one
             has ms-swift's own:  echo "import reft_kernels.integrations.swift" > reft_plugin.py

ms-swift's arguments for ReFT are understood: ``reft_rank``, ``reft_layers`` (none: all),
``reft_layer_key``, ``reft_intervention_type`` and ``reft_args``, a JSON object of pyreft's
``dropout``, ``act_fn``, ``add_bias`` and of :class:`~reft_kernels.integrations.peft.ReftConfig`'s
positions, share_weights, component, activation, parametrization, init, embed_dim and intervention.
Positions are the paper's, "f7+l7" of the prompt; ms-swift's own ReFT passes none and so edits every
token, which is ``{"positions": "all"}``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

if not __name__.startswith("reft_kernels."):
    # as a plugin: ms-swift puts this file's folder first on the path, where peft and swift would
    # hide the packages
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
"""The tuner's name: ``--tuner_type reft_kernels`` (4.x), ``--train_type reft_kernels`` (3.x)."""

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


def _options(given: str | Mapping[str, Any] | None) -> dict[str, Any]:
    if isinstance(given, str) and given.strip():
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"reft_args: got {given!r}, expected a JSON object ({error})"
            ) from None
    if not given:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"reft_args: got {given!r}, expected a JSON object")
    known = (*OPTIONS, "intervention", "act_fn", "add_bias")
    foreign = sorted(set(given) - set(known))
    if foreign:
        raise ValueError(
            f"reft_args: got {', '.join(foreign)}, expected names among {', '.join(known)}"
        )
    if "act_fn" in given and "activation" in given:
        raise ValueError("reft_args: got both act_fn and activation, expected one of them")
    return dict(given)


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
    """The PEFT configuration that ms-swift's arguments describe.

    Args:
        args: an object with ms-swift's attributes (``SftArguments``); those that are missing have
            ms-swift's defaults.

    Raises:
        ValueError, TypeError: an argument of another kind or out of range, naming it.
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


# ---- prompts


def _supervised(labels: Tensor, kept: int | Tensor, batch: int, width: int) -> Tensor:
    """Which tokens ``[B, T]`` have a label, from labels that ms-swift cut down with
    ``logits_to_keep``.
    """
    found = torch.zeros(batch, width, dtype=torch.bool, device=labels.device)
    if isinstance(
        kept, Tensor
    ):  # one example: the logits kept are those before a labelled token, and the last
        found[:, 1:] = kept[:-1].to(labels.device)
    else:
        found[:, width - labels.shape[1] :] = labels != IGNORED_LABEL
    return found


def _packed_lengths(supervised: Tensor, position_ids: Tensor) -> Tensor:
    """Prompt lengths of sequences one after the other, each of which starts at position 0."""
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
    """Before the model: say where prompts end when ``logits_to_keep``, on by default in
    ms-swift, has cut the labels.
    """
    labels, kept = kwargs.get("labels"), kwargs.get("logits_to_keep")
    tokens = (
        kwargs.get("input_ids")
        if kwargs.get("input_ids") is not None
        else kwargs.get("inputs_embeds")
    )
    if (
        kept is None
        or not isinstance(labels, Tensor)
        or not isinstance(tokens, Tensor)
        or any(n in kwargs for n in EXPLICIT)
    ):
        return None
    batch, width = tokens.shape[:2]
    if labels.shape == (batch, width):
        return None
    supervised = _supervised(labels, kept, batch, width)
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
    """Stands in for a tuner's forward: calls the model, hooks and all, where PEFT before 0.21
    calls its bare ``forward``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def _watched(model: PeftModel) -> PeftModel:
    inner = model.get_base_model()
    # first, before the tuner's own hook on the same module takes the explicit arguments out
    inner.register_forward_pre_hook(_keep_prompts, with_kwargs=True, prepend=True)
    model.base_model.__dict__["forward"] = _Called(inner)  # ms-swift 4 pins PEFT below 0.21
    return model


# ---- the tuner


class ReftKernelsTuner:
    """ms-swift's ``Tuner`` interface: three static methods; see the module's text for the
    arguments.
    """

    @staticmethod
    def prepare_model(args: Any, model: nn.Module) -> PeftModel:
        """The model with a new ReFT adapter, everything else frozen.

        Raises:
            ValueError, TypeError: arguments that :func:`reft_config` refuses, or that this model
                does not have; the model is then as it was.
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
        """Write ``adapter_config.json`` and the weights: those of ``state_dict``, where an
        engine has gathered them.
        """
        kwargs.setdefault("selected_adapters", ["default"])
        if state_dict is not None:
            kwargs["state_dict"] = state_dict
        model.save_pretrained(save_directory, safe_serialization=safe_serialization, **kwargs)

    @staticmethod
    def from_pretrained(model: nn.Module, model_id: str, **kwargs: Any) -> PeftModel:
        """The model with a saved adapter; ``is_trainable=True`` to go on training."""
        return _watched(PeftModel.from_pretrained(model, model_id, **kwargs))


def register(registry: MutableMapping[str, type] | None = None) -> None:
    """Add the tuner to ms-swift's (``swift.tuner_plugin.tuners_map`` of 4.x,
    ``swift.plugin.extra_tuners`` of 3.x).

    Raises:
        ImportError: ms-swift is not installed, or has another tuner of that name.
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
    for path, name in _REGISTRIES:
        try:
            return getattr(importlib.import_module(path), name)
        except ModuleNotFoundError as error:
            if error.name not in (
                "swift",
                path,
            ):  # ms-swift is there and lacks a package: that is for the user to see
                raise
    return None


_registry = _find_registry()
if (
    _registry is not None
):  # without ms-swift the class is still of use, by itself or through register(...)
    register(_registry)
