"""Inspection, validation and loading of the frozen model, its classifier and its tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_outputs import SequenceClassifierOutput

from reft_train.config import RunConfig
from reft_train.errors import UserError, one_line, wrong
from reft_train.tasks.base import Task

CAUSAL, SEQ2SEQ, CLASSIFICATION = "causal", "seq2seq", "classification"
HEAD = "classifier"  # submodule name passed to PEFT's modules_to_save
HEADS = (HEAD, "score", "classification_head")
_IDENTITY = ("model_type", "hidden_size", "d_model", "n_embd", "vocab_size")
_IDENTITY += ("num_hidden_layers", "num_layers", "n_layer")


@dataclass
class Loaded:
    """A model with its tokenizer. ``heads`` names new modules that must be trained."""

    model: Any
    tokenizer: Any
    kind: str
    heads: list[str]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Context manager for evaluation mode without gradients; restores each module's mode on exit.

    It does not use inference mode: tensors cached by the model must stay usable in training.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def bare(model: Any) -> Any:
    """Return the transformers model under an adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def model_config(config: RunConfig) -> Any:
    """Load the model's configuration, or raise UserError that says what to do."""
    path = Path(config.model)
    no_hub_name = path.exists() or path.is_absolute() or config.model.count("/") > 1
    if no_hub_name and not (path / "config.json").is_file():
        what = "without config.json" if path.exists() else "which does not exist"
        expected = "a folder with config.json, weights and a tokenizer: --model FOLDER"
        raise wrong("model", f"{config.model!r}, {what}", expected)
    logger = logging.getLogger("huggingface_hub")  # silences one warning per retry
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return transformers.AutoConfig.from_pretrained(config.model)
    except Exception as error:  # the hub client and broken files raise many types of error
        raise _unloadable(config.model, "which", error) from None
    finally:
        logger.setLevel(level)


def _unloadable(name: str, what: str, error: Exception) -> UserError:
    """Build the error for a model of which something cannot be loaded."""
    text = f"{name!r}, {what} cannot be loaded ({one_line(error)})"
    if Path(name).exists():
        return wrong("model", text, "a whole model")
    hint = "hf download NAME --local-dir FOLDER, then --model FOLDER"
    return wrong("model", text, f"a folder, or a name in the hub or its cache; {hint}")


def identity(hf_config: Any) -> dict[str, Any]:
    """Return the properties that identify a base model, for checking adapters against it."""
    # the text config holds the sizes of a multimodal model
    configs = (hf_config.get_text_config(), hf_config)
    pairs = [(name, getattr(part, name, None)) for part in configs for name in _IDENTITY]
    return {name: value for name, value in pairs if isinstance(value, int | str)}


def positions_of(hf_config: Any) -> int | None:
    """Return the number of tokens that a model reads, or None if its configuration has none."""
    text = hf_config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)


def kind_of(config: RunConfig, hf_config: Any, task: Task) -> str:
    """Return how the model is used: ``architecture`` if set, else derived from model and task."""
    generates = task.decoding is not None
    named = " ".join(getattr(hf_config, "architectures", None) or ())
    causal = any(part in named for part in ("CausalLM", "LMHead", "ConditionalGeneration"))
    if config.architecture != "auto":
        kind = {"encoder": CLASSIFICATION}.get(config.architecture, config.architecture)
    elif generates and getattr(hf_config, "is_encoder_decoder", False):
        kind = SEQ2SEQ
    else:
        kind = CAUSAL if generates and causal else CLASSIFICATION
    if kind == CLASSIFICATION and generates and task.labels is None:
        what = f"which generates text, with {hf_config.model_type}"
        raise wrong("task", f"{task.name!r}, {what}", "a causal model")
    if kind != CLASSIFICATION and not generates:
        raise wrong(
            "architecture", f"{config.architecture!r} with {task.name!r}", "encoder or auto"
        )
    return kind


def load_tokenizer(config: RunConfig) -> Any:
    """Load the model's tokenizer and ensure that it has a padding token."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    except Exception as error:  # the error type for a broken file depends on the tokenizer
        raise _unloadable(config.model, "whose tokenizer", error) from None
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise wrong("model", f"{config.model!r}", "a tokenizer with a padding or an EOS token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token works
    return tokenizer


def _quantization(config: RunConfig) -> Any:
    if config.quantization == "none":
        return None
    if find_spec("bitsandbytes") is None:
        what = f"{config.quantization!r}, but bitsandbytes is not installed"
        raise wrong("quantization", what, "none")
    # it warns in every forward that 8-bit mode rounds activations
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    eight = config.quantization == "8bit"
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    four |= {"bnb_4bit_use_double_quant": True}
    return transformers.BitsAndBytesConfig(load_in_8bit=eight, load_in_4bit=not eight, **four)


def pick_device(config: RunConfig) -> str:
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise wrong("device", "cuda, but torch finds no CUDA device", "cpu or auto")
    return "cuda" if cuda and config.device != "cpu" else "cpu"


def load(config: RunConfig, task: Task) -> Loaded:
    """Load the frozen model in the requested dtype with its tokenizer.

    A new head is initialized from the seed.
    """
    hf_config = model_config(config)
    kind, mean = kind_of(config, hf_config, task), config.pooling == "mean"
    if mean and kind != CLASSIFICATION:
        raise wrong("pooling", f"'mean' with a {kind} model", "'model': it generates text")
    tokenizer, quantization = load_tokenizer(config), _quantization(config)
    cpu = pick_device(config) == "cpu"
    automatic = "bfloat16" if not cpu and torch.cuda.is_bf16_supported() else "float32"
    # with no map bitsandbytes would use an available GPU
    placed = "auto" if config.device_map == "auto" else "cpu" if quantization and cpu else None
    options: dict[str, Any] = {
        "config": hf_config,
        "dtype": getattr(torch, automatic if config.dtype == "auto" else config.dtype),
        "quantization_config": quantization,
        "attn_implementation": config.attention,
        "device_map": placed,
    }
    options = {name: value for name, value in options.items() if value is not None}
    if kind == CLASSIFICATION:
        hf_config.num_labels = task.num_labels
        classes = task.labels is not None
        hf_config.problem_type = "single_label_classification" if classes else "regression"
        if getattr(hf_config, "pad_token_id", None) is None:
            # decoders locate the last real token by the pad id
            hf_config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(config.seed)  # initializes a new head
    names = {CAUSAL: "AutoModelForCausalLM", SEQ2SEQ: "AutoModelForSeq2SeqLM"}
    name = names.get(kind, "AutoModelForSequenceClassification")
    kind_class = transformers.AutoModel if mean else getattr(transformers, name)
    try:
        model, info = kind_class.from_pretrained(
            config.model, output_loading_info=True, use_safetensors=True, **options
        )
    except Exception as error:  # raised by the hub client, safetensors or transformers
        raise _unloadable(config.model, "whose weights", error) from None
    heads = []
    if kind == CLASSIFICATION:
        missing = sorted({key.rpartition(".")[0] for key in info["missing_keys"]})
        heads = missing or [name for name in HEADS if hasattr(model, name)]
    if mean:
        model, heads = MeanPooledClassifier(model, hf_config.num_labels, config.seed), [HEAD]
    if config.liger:
        if find_spec("liger_kernel") is None:
            raise wrong("liger", "true, but liger-kernel is not installed", "false")
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        # Trainer would patch the model after its adapter
        _apply_liger_kernel_to_instance(model=model)
    return Loaded(model.requires_grad_(False), tokenizer, kind, heads)


class MeanPooledClassifier(nn.Module):
    """Linear classifier on the mean of a frozen encoder's last hidden states over real tokens.

    Inputs and outputs match transformers' sequence classifiers. With one output the labels are real
    numbers and the loss is the squared error; otherwise classes and cross entropy.

    Args:
        encoder: a transformers model that returns ``last_hidden_state`` ``[B, T, d]``.
        num_labels: number of outputs.
        seed: seed of the classifier's initial weights.
    """

    def __init__(self, encoder: nn.Module, num_labels: int, seed: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.config = encoder.config
        self.name_or_path = encoder.name_or_path  # PEFT stores it in the adapter's configuration
        self.classifier = nn.Linear(self.config.hidden_size, num_labels)
        bound = self.config.hidden_size**-0.5
        if not self.classifier.weight.is_meta:
            generator = torch.Generator().manual_seed(seed)
            nn.init.uniform_(self.classifier.weight, -bound, bound, generator=generator)
            nn.init.zeros_(self.classifier.bias)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # forwards device, gradient checkpointing and other attributes
            return getattr(super().__getattr__("encoder"), name)

    def get_input_embeddings(self) -> nn.Module:
        """Return the encoder's token embedding."""
        return self.encoder.get_input_embeddings()

    def can_generate(self) -> bool:
        """Return False: labels are classes, so the whole sequence is the prompt."""
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """Compute logits ``[B, num_labels]``, and the loss if ``labels [B]`` is given."""
        known = ("inputs_embeds", "token_type_ids")
        options = {name: inputs[name] for name in known if inputs.get(name) is not None}
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **options)
        hidden = output.last_hidden_state
        mask = torch.ones_like(hidden[..., 0]) if attention_mask is None else attention_mask
        mask = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
        logits, loss = self.classifier(pooled.to(self.classifier.weight.dtype)), None
        if labels is not None:
            loss = ForSequenceClassificationLoss(labels, logits, self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)
