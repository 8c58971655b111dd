"""The frozen model and its tokenizer: found out, checked and loaded, or refused in one line."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reft_train.config import RunConfig
from reft_train.errors import UserError
from reft_train.tasks.base import Task

CAUSAL, SEQ2SEQ, CLASSIFICATION = "causal", "seq2seq", "classification"
HEADS = ("classifier", "score", "classification_head")
_IDENTITY = (
    "model_type",
    "hidden_size",
    "d_model",
    "n_embd",
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "vocab_size",
)


@dataclass
class Loaded:
    """A model with its tokenizer.

    ``kind`` is "causal", "seq2seq" or "classification"; ``heads`` are the modules that are new and
    have to be trained.
    """

    model: Any
    tokenizer: Any
    kind: str
    heads: list[str]


def _offline_reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def model_config(config: RunConfig) -> Any:
    """The model's configuration.

    Raises:
        UserError: no such folder or hub name, or no network.
    """
    from transformers import AutoConfig

    path = Path(config.model)
    if not path.exists() and _is_local(config.model):
        raise UserError(
            f"model: got {config.model!r}, which cannot be loaded (no such folder), expected a "
            "model's folder"
        )
    if path.exists() and not (path / "config.json").is_file():
        raise UserError(
            f"model: got {path}, expected a folder with config.json, weights and a tokenizer"
        )
    try:
        return AutoConfig.from_pretrained(config.model)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise UserError(
            f"model: got {config.model!r}, which cannot be loaded ({_offline_reason(error)})"
        ) from None


def _is_local(name: str) -> bool:
    """Whether a name can only be a folder's: a hub name has at most one slash, and none in
    front.
    """
    return name.startswith((".", "~")) or Path(name).is_absolute() or name.count("/") > 1


def check_reachable(config: RunConfig, run: Path) -> None:
    """Refuse to go on with a run whose base model is not where it was.

    Raises:
        UserError: naming the recorded model, and the flag that gives its new place.
    """
    try:
        model_config(config)
    except UserError as error:
        if Path(config.model).exists():
            reason = f"cannot be loaded ({error})"
        elif _is_local(config.model):
            reason = "does not exist any more"
        else:
            reason = f"does not exist as a folder here and cannot be loaded by that name ({error})"
        where = f"{config.model!r}, which {reason}"
        raise UserError(
            f"model: {run} was trained on {where}; --model DIR gives its new place"
        ) from None


def identity(hf_config: Any) -> dict[str, Any]:
    """What tells one base model from another, for adapters that were trained on it."""
    configs = [hf_config]
    if callable(getattr(hf_config, "get_text_config", None)):
        configs.append(hf_config.get_text_config())  # which holds a multimodal model's sizes
    found: dict[str, Any] = {}
    for part in configs:
        for name in _IDENTITY:
            if isinstance(getattr(part, name, None), int | str):
                found.setdefault(name, getattr(part, name))
    return found


def kind_of(config: RunConfig, hf_config: Any, task: Task) -> str:
    """How the model is used for a task: the wish of ``architecture``, or what the model and the
    task say.

    Raises:
        UserError: a task that this use does not serve.
    """
    generates, classifies = (
        task.decoding is not None,
        task.labels is not None or task.decoding is None,
    )
    named = " ".join(getattr(hf_config, "architectures", None) or ())
    if config.architecture != "auto":
        kind = {"encoder": CLASSIFICATION}.get(config.architecture, config.architecture)
    elif not generates:
        kind = CLASSIFICATION
    elif getattr(hf_config, "is_encoder_decoder", False):
        kind = SEQ2SEQ
    elif "CausalLM" in named or "LMHead" in named or "ConditionalGeneration" in named:
        kind = CAUSAL
    else:
        kind = CLASSIFICATION
    if kind == CLASSIFICATION and not classifies:
        raise UserError(
            f"task: got {task.name!r}, which generates text, with {hf_config.model_type}, "
            "expected a causal model"
        )
    if kind != CLASSIFICATION and not generates:
        raise UserError(
            f"architecture: got {config.architecture!r} with {task.name!r}, expected encoder or "
            "auto"
        )
    return kind


def load_tokenizer(config: RunConfig) -> Any:
    """The model's tokenizer.

    Raises:
        UserError: there is none that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model)
    except Exception as error:  # what a broken file raises differs from one tokenizer to the next
        raise UserError(
            f"model: got {config.model!r}, whose tokenizer cannot be loaded "
            f"({_offline_reason(error)})"
        ) from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"model: got {config.model!r}, whose tokenizer has neither a padding nor an end "
                "token"
            )
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token serves
    return tokenizer


def _quantization(config: RunConfig) -> Any:
    if config.quantization == "none":
        return None
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"quantization: got {config.quantization!r}, expected none: bitsandbytes is not "
            "installed"
        )
    import torch
    from transformers import BitsAndBytesConfig

    # it says in every forward that it rounds activations, which 8 bits mean
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def pick_device(config: RunConfig) -> str:
    """``cuda`` or ``cpu``.

    Raises:
        UserError: cuda is wanted and not there.
    """
    import torch

    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise UserError("device: got cuda, but torch sees no CUDA device, expected cpu or auto")
    return "cuda" if cuda and config.device != "cpu" else "cpu"


def weight_dtype(config: RunConfig) -> Any:
    """The dtype of the frozen weights."""
    import torch

    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return (
        torch.bfloat16
        if pick_device(config) == "cuda" and torch.cuda.is_bf16_supported()
        else torch.float32
    )


def class_of(config: RunConfig, kind: str) -> str:
    """The name of transformers' class that is loaded.

    Raises:
        UserError: pooling by a model that does not classify.
    """
    if config.pooling == "mean":
        if kind != CLASSIFICATION:
            raise UserError(
                f"pooling: got 'mean' with a {kind} model, expected 'model': it generates text"
            )
        return "AutoModel"
    return {CAUSAL: "AutoModelForCausalLM", SEQ2SEQ: "AutoModelForSeq2SeqLM"}.get(
        kind, "AutoModelForSequenceClassification"
    )


def load(config: RunConfig, task: Task) -> Loaded:
    """The frozen model in the wanted dtype, with its tokenizer; a new head is drawn from the seed.

    Raises:
        UserError: weights that cannot be loaded, or packages that the settings need and that are
            missing.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    from reft_train.pooling import HEAD, MeanPooledClassifier

    hf_config = model_config(config)
    kind = kind_of(config, hf_config, task)
    tokenizer = load_tokenizer(config)
    options: dict[str, Any] = {
        "config": hf_config,
        "dtype": weight_dtype(config),
        "quantization_config": _quantization(config),
    }
    options = {name: value for name, value in options.items() if value is not None}
    if config.attention is not None:
        options["attn_implementation"] = config.attention
    if config.device_map == "auto":
        options["device_map"] = "auto"
    elif config.quantization != "none" and pick_device(config) == "cpu":
        options["device_map"] = "cpu"  # bitsandbytes would take a GPU that is there
    if kind == CLASSIFICATION:
        hf_config.num_labels = task.num_labels
        hf_config.problem_type = (
            "regression" if task.labels is None else "single_label_classification"
        )
        if getattr(hf_config, "pad_token_id", None) is None:
            hf_config.pad_token_id = (
                tokenizer.pad_token_id
            )  # decoders find the last real token by it
    torch.manual_seed(config.seed)  # a new head is drawn here
    try:
        model, info = getattr(transformers, class_of(config, kind)).from_pretrained(
            config.model, output_loading_info=True, use_safetensors=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(
            f"model: got {config.model!r}, whose weights cannot be loaded "
            f"({_offline_reason(error)})"
        ) from None
    heads = _new_modules(model, info["missing_keys"]) if kind == CLASSIFICATION else []
    if config.pooling == "mean":
        model, heads = MeanPooledClassifier(model, hf_config.num_labels, config.seed), [HEAD]
    if config.liger:
        _apply_liger(model)
    return Loaded(model.requires_grad_(False), tokenizer, kind, heads)


def _new_modules(model: Any, missing: Any) -> list[str]:
    fresh = sorted({key.rpartition(".")[0] for key in missing})
    if fresh:
        return fresh
    return [name for name in HEADS if hasattr(model, name)]


def _apply_liger(model: Any) -> None:
    if find_spec("liger_kernel") is None:
        raise UserError("liger: got true, expected false: liger-kernel is not installed")
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model)
