"""What is trained: a member of the ReFT family, or a PEFT baseline, on a frozen model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reft_train.config import REFT_METHODS, RunConfig
from reft_train.errors import UserError
from reft_train.files import write_text
from reft_train.models import CAUSAL, CLASSIFICATION, Loaded, identity

TITLES = {
    "loreft": "LoReFT",
    "direft": "h + Rᵀ(Wh + b)",
    "nodireft": "DiReFT",
    "noreft": "NoReFT",
    "consreft": "ConsReFT",
    "lobireft": "LobiReFT",
    "red": "RED",
    "lora": "LoRA",
    "dora": "DoRA",
    "prefix": "prefix tuning",
    "ia3": "IA3",
    "head": "frozen model, trained head",
}
"""How the paper names each method; its DiReFT is the unconstrained one, ``nodireft``."""
BASE_MODEL = "base_model.json"


def _task_type(kind: str) -> str:
    return {CAUSAL: "CAUSAL_LM", CLASSIFICATION: "SEQ_CLS"}.get(kind, "SEQ_2_SEQ_LM")


def _reft(config: RunConfig, common: dict[str, Any], response_template: list[int] | None) -> Any:
    from reft_kernels.integrations.peft import ReftConfig

    return ReftConfig(
        layers=config.layers,
        rank=config.rank,
        positions=config.positions,
        share_weights=config.share_weights,
        intervention=config.method,
        component=config.component,
        activation=config.activation,
        dropout=config.dropout,
        parametrization=config.parametrization,
        init=None if config.init == "auto" else config.init,
        response_template=response_template,
        **common,
    )


def peft_config(
    config: RunConfig, loaded: Loaded, response_template: list[int] | None = None
) -> Any:
    """The PEFT configuration of the method.

    Args:
        response_template: ids that end a prompt, for the ReFT family; None: labels tell it.

    Raises:
        UserError: a method that the model's use does not have.
    """
    import peft
    from peft.utils.constants import DUMMY_TARGET_MODULES

    common: dict[str, Any] = {"task_type": _task_type(loaded.kind)}
    if loaded.kind == CLASSIFICATION:
        common["modules_to_save"] = list(loaded.heads)
    if config.method in REFT_METHODS:
        return _reft(config, common, response_template)
    if config.method == "head":
        if loaded.kind != CLASSIFICATION:
            raise UserError(
                "method: got 'head', expected a task with classes on an encoder: a language model "
                "has no new head"
            )
        return peft.LoraConfig(
            target_modules=DUMMY_TARGET_MODULES, **common
        )  # adapts nothing; saves and loads the head
    if config.method == "prefix":
        common.pop("modules_to_save", None)
        return peft.PrefixTuningConfig(num_virtual_tokens=config.prefix_tokens, **common)
    targets = config.lora_targets or None
    if config.method == "ia3":
        return peft.IA3Config(
            target_modules=targets, feedforward_modules=_feedforward(targets), **common
        )
    chosen = {} if config.layers == "all" else {"layers_to_transform": list(config.layers)}
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        use_dora=config.method == "dora",
        **chosen,
        **common,
    )


def _feedforward(targets: list[str] | None) -> list[str] | None:
    """Which of IA3's modules scale their input: those that end a feed-forward layer."""
    if targets is None:
        return None
    return [
        name
        for name in targets
        if name.rpartition(".")[2] in ("down_proj", "wo", "fc2", "c_proj", "dense_4h_to_h")
    ]


def adapt(config: RunConfig, loaded: Loaded, response_template: list[int] | None = None) -> Any:
    """The frozen model with the method's fresh, trainable parameters, drawn from the seed.

    Args:
        response_template: as of :func:`peft_config`.

    Raises:
        UserError: layers, components or modules that the model does not have.
    """
    import torch
    from peft import get_peft_model

    torch.manual_seed(config.seed)
    try:
        model = get_peft_model(loaded.model, peft_config(config, loaded, response_template))
    except (ValueError, TypeError) as error:
        raise UserError(f"method {config.method}: {' '.join(str(error).split())}") from None
    return model


def save_adapter(model: Any, folder: Path, state_dict: dict[str, Any] | None = None) -> None:
    """Write the adapter in PEFT's layout, with what tells its base model."""
    model.save_pretrained(str(folder), state_dict=state_dict, safe_serialization=True)
    record_base(model.get_base_model().config, folder)


def load_adapter(loaded: Loaded, folder: str | Path, *, trainable: bool = False) -> Any:
    """The frozen model with a saved adapter.

    Raises:
        UserError: no adapter there, or one of another model.
    """
    from peft import PeftModel

    import reft_kernels.integrations.peft  # noqa: F401  (registers the method that the file names)

    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"adapter: got {folder}, expected a folder with adapter_config.json and "
            "adapter_model.safetensors"
        )
    check_base(loaded.model.config, folder)
    try:
        return PeftModel.from_pretrained(loaded.model, str(folder), is_trainable=trainable)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"adapter: got {folder}, which does not fit the model "
            f"({' '.join(str(error).split())[:300]})"
        ) from None


def record_base(hf_config: Any, folder: Path) -> None:
    """Write what tells the base model of a run or an adapter."""
    write_text(folder / BASE_MODEL, json.dumps(identity(hf_config)))


def _differing(hf_config: Any, folder: Path) -> tuple[str, Any, Any] | None:
    """The name, recorded value and own value of what differs; None where nothing does, or
    nothing is recorded.
    """
    try:
        saved = json.loads((folder / BASE_MODEL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # by another program or an earlier release: PEFT compares the shapes
    own = identity(hf_config)
    return next(
        ((name, value, own.get(name)) for name, value in saved.items() if own.get(name) != value),
        None,
    )


def check_base(hf_config: Any, folder: Path) -> None:
    """Refuse an adapter whose base model was another one.

    Raises:
        UserError: naming what differs.
    """
    if found := _differing(hf_config, folder):
        name, value, own = found
        raise UserError(
            f"adapter: got {folder}, trained on a model with {name} {value}, but the model has "
            f"{own}"
        )


def check_run_base(config: RunConfig, folder: Path, hf_config: Any) -> None:
    """Refuse a model that is not the one that a run was trained on; a run without the record takes
    any.

    Raises:
        UserError: naming what differs.
    """
    if found := _differing(hf_config, folder):
        name, value, own = found
        raise UserError(
            f"model: got {config.model!r} with {name} {own}, but {folder} was trained on a model "
            f"with {name} {value}, "
            "expected the same model"
        )
