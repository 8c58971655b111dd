"""Checks before PEFT saves or loads an adapter folder, and the section of the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn

from reft_kernels.adapter_files import read_bin, read_safetensors
from reft_kernels.integrations.peft import combining
from reft_kernels.integrations.peft.layer import find_container

CARD = "README.md"
HEADING = "## Load this ReFT adapter"
SECTION = f"""{HEADING}

Install the package `reft_kernels`; PEFT and transformers then load this folder like any other
adapter. With `TORCH_DEVICE_BACKEND_AUTOLOAD=0`, run the first line before PEFT loads the folder;
otherwise PEFT raises `KeyError: 'REFT'`.

```python
import reft_kernels.integrations.peft
model = peft.PeftModel.from_pretrained(base_model, "path/to/this/folder")
```
"""


def write_card(folder: Path, config: PeftConfig) -> None:
    """Append a section that explains how to load the adapter to the model card, once.

    Args:
        folder: the adapter folder.
        config: the adapter's configuration, for the header of a new card.
    """
    path = folder / CARD
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:  # newline="" keeps line endings
            text = file.read()
        if HEADING in text:
            return
        text = text.rstrip() + "\n\n"
    else:
        base = config.base_model_name_or_path
        text = "---\n" + (f"base_model: {base}\n" if base else "") + "library_name: peft\n---\n\n"
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text + SECTION)


def check_weights(config: PeftConfig) -> None:
    """Check the weights in a local folder before the model is changed.

    Args:
        config: a configuration from ``from_pretrained``. Folders on the Hub are not checked.

    Raises:
        ValueError: the weights are missing, truncated or of another format, or loading them would
            execute code.
    """
    folder = Path(config.folder) if config.folder else None
    if folder is None or not (folder / CONFIG_NAME).is_file():
        return  # on the Hub: PEFT downloads it later
    if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        read_safetensors(folder / SAFETENSORS_WEIGHTS_NAME)
    elif (folder / WEIGHTS_NAME).is_file():
        read_bin(folder / WEIGHTS_NAME)
    else:
        raise ValueError(
            f"{folder}: got {CONFIG_NAME} without {SAFETENSORS_WEIGHTS_NAME}; the adapter was not "
            "saved completely"
        )


def check_complete(model: nn.Module, adapter_name: str) -> None:
    """Check before saving that no adapter's weights would be lost.

    Args:
        model: the model to save.
        adapter_name: name of the adapter to save.

    Raises:
        ValueError: an adapter of another method has no weights in the model any more, or another
            ``PeftModel`` wraps the model.
    """
    found = find_container(model)
    path = "" if found is None else found[0]
    if path.split(".").count("base_model") > 1:
        raise ValueError(
            f"adapter {adapter_name!r}: another PeftModel wraps the model with ReFT, so the saved "
            f"files would not load again; {combining.ORDER}"
        )
    configs: Any = model.peft_config
    lost = combining.without_weights(model, configs)
    if lost:
        raise ValueError(
            f"adapter {lost[0]!r} has no weights in this model any more, as after "
            f"merge_and_unload; call delete_adapter({lost[0]!r}), and save the merged base model "
            "separately"
        )
