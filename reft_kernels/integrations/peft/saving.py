"""What stands around PEFT's saving and loading of an adapter folder: the model card's section, and
refusing what is damaged.
"""

from __future__ import annotations

from pathlib import Path

from peft.config import PeftConfig
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn

from reft_kernels.conversion.files import read_bin, read_safetensors
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
    """Add to a folder's model card how to load the adapter, once; what the card says already
    stays.
    """
    path = folder / CARD
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:  # line ends stay as they are
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
    """Refuse a local folder whose weights are missing or damaged, before the model is touched.

    Raises:
        ValueError: no weights, a truncated or foreign file, or one that would have to execute code.
    """
    folder = Path(config.folder) if config.folder else None
    if folder is None or not (folder / CONFIG_NAME).is_file():
        return  # of the Hub: PEFT downloads it
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
    """Refuse to save where another adapter's weights, or these, would be lost.

    Raises:
        ValueError: an adapter without layers, or a ``PeftModel`` around the one that ReFT attached
            to.
    """
    found = find_container(model)
    path = "" if found is None else found[0]
    if path.split(".").count("base_model") > 1:
        raise ValueError(
            f"adapter {adapter_name!r}: another PeftModel stands around the model with ReFT, so "
            "that what is saved would not "
            f"load again; {combining.ORDER}"
        )
    lost = combining.without_weights(model, model.peft_config)
    if lost:
        raise ValueError(
            f"adapter {lost[0]!r} has no weights in this model any more, as after "
            "merge_and_unload; call "
            f"delete_adapter({lost[0]!r}), and save the merged base model besides"
        )
