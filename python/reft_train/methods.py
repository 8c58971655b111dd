"""Finetuning methods: members of the ReFT family and PEFT baselines on a frozen model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.constants import DUMMY_TARGET_MODULES

from reft_kernels.base_model import size_differences
from reft_kernels.integrations.peft import ReftConfig  # registers the method that files name
from reft_train.config import REFT_METHODS, RunConfig
from reft_train.errors import UserError, one_line, wrong
from reft_train.files import read_json, write_text
from reft_train.models import CAUSAL, CLASSIFICATION, Loaded, identity

BASE_MODEL = "base_model.json"


def peft_config(
    config: RunConfig, loaded: Loaded, response_template: list[int] | None = None
) -> Any:
    """Build the PEFT configuration of the method.

    Args:
        response_template: token ids that end a prompt, for ReFT methods. None: prompt ends are
            found from the labels.
    """
    types = {CAUSAL: "CAUSAL_LM", CLASSIFICATION: "SEQ_CLS"}
    common: dict[str, Any] = {"task_type": types.get(loaded.kind, "SEQ_2_SEQ_LM")}
    if loaded.kind == CLASSIFICATION and config.method != "prefix":
        common["modules_to_save"] = list(loaded.heads)
    if config.method in REFT_METHODS:
        names = ("layers", "rank", "positions", "share_weights", "component", "activation")
        same = {name: getattr(config, name) for name in (*names, "dropout", "parametrization")}
        common |= {"init": None if config.init == "auto" else config.init}
        common |= {"intervention": config.method, "response_template": response_template}
        return ReftConfig(**same, **common)
    if config.method == "head":
        if loaded.kind != CLASSIFICATION:
            raise wrong("method", "'head' with a model that generates", "a task with classes")
        # adapts no layer; only saves and loads the head
        return peft.LoraConfig(target_modules=DUMMY_TARGET_MODULES, **common)
    if config.method == "prefix":
        return peft.PrefixTuningConfig(num_virtual_tokens=config.prefix_tokens, **common)
    targets = config.lora_targets or None
    if config.method == "ia3":
        # IA3 scales the input of feed-forward modules
        ends = ("down_proj", "wo", "fc2", "c_proj", "dense_4h_to_h")
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
    """Add the method's trainable parameters, initialized from the seed, to the frozen model."""
    torch.manual_seed(config.seed)
    try:
        return peft.get_peft_model(loaded.model, peft_config(config, loaded, response_template))
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"method {config.method}: {one_line(error, 1000)}") from None


def save_adapter(model: Any, folder: Path, state_dict: dict[str, Any] | None = None) -> None:
    """Write the adapter in PEFT's format, with a record that identifies its base model."""
    model.save_pretrained(str(folder), state_dict=state_dict, safe_serialization=True)
    record_base(model.get_base_model().config, folder)


def load_adapter(loaded: Loaded, folder: str | Path, *, trainable: bool = False) -> Any:
    """Load a saved adapter onto the frozen model."""
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise wrong("adapter", folder, "a folder with adapter_config.json and weights")
    check_base(loaded.model.config, folder)
    try:
        return peft.PeftModel.from_pretrained(loaded.model, str(folder), is_trainable=trainable)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        text = f"adapter: got {folder}, which does not fit the model ({one_line(error)})"
        raise UserError(text) from None


def base_model(folder: Path) -> str | None:
    """Return the name of the base model that a saved adapter records."""
    config = read_json(folder / "adapter_config.json", dict[str, Any], "--adapter")
    return config.get("base_model_name_or_path")


def record_base(hf_config: Any, folder: Path) -> None:
    """Write a file that identifies the base model of a run or an adapter."""
    write_text(folder / BASE_MODEL, json.dumps(identity(hf_config)))


def check_base(hf_config: Any, folder: Path, name: str = "adapter") -> None:
    """Raise UserError if a run or an adapter was trained on a different base model.

    A folder without a record of the base model is accepted: PEFT compares the shapes.
    """
    path = folder / BASE_MODEL
    saved = read_json(path, dict[str, Any], BASE_MODEL) if path.is_file() else {}
    for key, (value, other) in size_differences(saved, identity(hf_config)).items():
        what = f"a model with {key} {other}"
        raise UserError(f"{name}: got {what}, but {folder} was trained with {key} {value}")
