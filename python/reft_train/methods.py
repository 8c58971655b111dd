"""What is trained: a member of the ReFT family, or a PEFT baseline, on a frozen model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reft_train.config import REFT_METHODS, RunConfig
from reft_train.errors import UserError
from reft_train.files import read_object, write_text
from reft_train.models import CAUSAL, CLASSIFICATION, Loaded, identity

# how the paper names each method; its DiReFT is the unconstrained one
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
BASE_MODEL = "base_model.json"


def peft_config(
    config: RunConfig, loaded: Loaded, response_template: list[int] | None = None
) -> Any:
    """The PEFT configuration of the method.

    Args:
        response_template: ids that end a prompt, for the ReFT family; None: labels tell it.
    """
    import peft
    from peft.utils.constants import DUMMY_TARGET_MODULES

    from reft_kernels.integrations.peft import ReftConfig

    types = {CAUSAL: "CAUSAL_LM", CLASSIFICATION: "SEQ_CLS"}
    common: dict[str, Any] = {"task_type": types.get(loaded.kind, "SEQ_2_SEQ_LM")}
    if loaded.kind == CLASSIFICATION and config.method != "prefix":
        common["modules_to_save"] = list(loaded.heads)
    if config.method in REFT_METHODS:
        names = (
            "layers",
            "rank",
            "positions",
            "share_weights",
            "component",
            "activation",
            "dropout",
            "parametrization",
        )
        same = {name: getattr(config, name) for name in names}
        init = None if config.init == "auto" else config.init
        return ReftConfig(
            intervention=config.method,
            init=init,
            response_template=response_template,
            **same,
            **common,
        )
    if config.method == "head":
        if loaded.kind != CLASSIFICATION:
            expected = "a task with classes on an encoder: a language model has no new head"
            raise UserError(f"method: got 'head', expected {expected}")
        return peft.LoraConfig(
            target_modules=DUMMY_TARGET_MODULES, **common
        )  # adapts nothing; saves and loads the head
    if config.method == "prefix":
        return peft.PrefixTuningConfig(num_virtual_tokens=config.prefix_tokens, **common)
    targets = config.lora_targets or None
    if config.method == "ia3":
        ends = (
            "down_proj",
            "wo",
            "fc2",
            "c_proj",
            "dense_4h_to_h",
        )  # of feed-forward layers: these scale their input
        last = targets and [name for name in targets if name.rpartition(".")[2] in ends]
        return peft.IA3Config(target_modules=targets, feedforward_modules=last, **common)
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        use_dora=config.method == "dora",
        layers_to_transform=None if config.layers == "all" else list(config.layers),
        **common,
    )


def adapt(config: RunConfig, loaded: Loaded, response_template: list[int] | None = None) -> Any:
    """The frozen model with the method's fresh, trainable parameters, drawn from the seed."""
    import torch
    from peft import get_peft_model

    torch.manual_seed(config.seed)
    try:
        return get_peft_model(loaded.model, peft_config(config, loaded, response_template))
    except (ValueError, TypeError) as error:
        raise UserError(f"method {config.method}: {' '.join(str(error).split())}") from None


def save_adapter(model: Any, folder: Path, state_dict: dict[str, Any] | None = None) -> None:
    """Write the adapter in PEFT's layout, with what tells its base model."""
    model.save_pretrained(str(folder), state_dict=state_dict, safe_serialization=True)
    record_base(model.get_base_model().config, folder)


def load_adapter(loaded: Loaded, folder: str | Path, *, trainable: bool = False) -> Any:
    """The frozen model with a saved adapter."""
    from peft import PeftModel

    import reft_kernels.integrations.peft  # noqa: F401  (registers the method that the file names)

    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        expected = "a folder with adapter_config.json and adapter_model.safetensors"
        raise UserError(f"adapter: got {folder}, expected {expected}")
    check_base(loaded.model.config, folder)
    try:
        return PeftModel.from_pretrained(loaded.model, str(folder), is_trainable=trainable)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"adapter: got {folder}, which does not fit the model ({reason})") from None


def record_base(hf_config: Any, folder: Path) -> None:
    """Write what tells the base model of a run or an adapter."""
    write_text(folder / BASE_MODEL, json.dumps(identity(hf_config)))


def _differing(hf_config: Any, folder: Path) -> tuple[str, Any, Any] | None:
    """The name, recorded value and own value of what differs; None where nothing does or is
    recorded.
    """
    path = folder / BASE_MODEL
    if not path.is_file():
        return None  # by another program or an earlier release: PEFT compares the shapes
    saved, own = read_object(path, BASE_MODEL), identity(hf_config)
    return next(
        ((name, value, own.get(name)) for name, value in saved.items() if own.get(name) != value),
        None,
    )


def check_base(hf_config: Any, folder: Path) -> None:
    """Refuse an adapter whose base model was another one."""
    if found := _differing(hf_config, folder):
        name, value, own = found
        raise UserError(
            f"adapter: got {folder}, trained on a model with {name} {value}, but the model has "
            f"{own}"
        )


def check_run_base(config: RunConfig, folder: Path, hf_config: Any) -> None:
    """Refuse a model that is not the one that a run was trained on; a run without the record
    takes any.
    """
    if found := _differing(hf_config, folder):
        name, value, own = found
        begun = f"{folder} was trained on a model with {name} {value}, expected the same model"
        raise UserError(f"model: got {config.model!r} with {name} {own}, but {begun}")
