"""Estimate of training memory on PyTorch's meta device, without reading weights.

Weights are counted by accelerate; activations are the tensors saved by a forward on the meta
device. Not included: memory of the libraries, allocator overhead, activations of mixture-of-experts
layers, and sharding.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from reft_train import methods, models
from reft_train.config import REFT_METHODS, RunConfig
from reft_train.errors import one_line, wrong
from reft_train.tasks.base import Task


@dataclass(frozen=True)
class Estimate:
    """Estimated parameter counts and bytes; ``length`` is the number of tokens per example."""

    model_numbers: int
    trainable: int
    head: int
    frozen: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    length: int

    @property
    def step(self) -> int:
        """Memory of a training step in addition to the weights."""
        return self.gradients + self.optimizer + self.activations

    @property
    def total(self) -> int:
        """Total memory."""
        return self.frozen + self.trained + self.step


def empty_model(config: RunConfig, task: Task, dtype: torch.dtype) -> tuple[nn.Module, str]:
    """Build the frozen model on the meta device from ``config.json``; also return its kind."""
    from reft_train.pooling import MeanPooledClassifier

    hf_config = models.model_config(config)
    kind = models.kind_of(config, hf_config, task)
    if kind == models.CLASSIFICATION:
        hf_config.num_labels = task.num_labels
    options = {} if config.attention is None else {"attn_implementation": config.attention}
    build = models.class_of(config, kind).from_config
    try:
        with torch.device("meta"):
            model = build(hf_config, dtype=dtype, **options)
            if config.pooling == "mean":
                model = MeanPooledClassifier(model, hf_config.num_labels, config.seed)
    except (ValueError, KeyError, ImportError) as error:
        raise wrong("model", f"{config.model!r}", f"a known model ({one_line(error)})") from None
    return model.requires_grad_(False), kind


def _matrices(part: nn.Module) -> list[nn.Module]:
    """Return the linear layers, including GPT-2's Conv1D."""
    return [m for m in part.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the outermost layers, of an encoder and a decoder if the model has both."""
    lists: list[nn.ModuleList] = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) and _matrices(module[0]):
            inner = any(module in set(other.modules()) for other in lists)
            lists += [] if inner else [module]
    return [block for part in lists for block in part]


def _frozen_bytes(config: RunConfig, model: nn.Module) -> int:
    from accelerate.utils import CustomDtype
    from accelerate.utils.modeling import compute_module_sizes

    special: dict[str, Any] = {}
    if config.quantization != "none":
        kind = CustomDtype.INT4 if config.quantization == "4bit" else torch.int8
        output = model.get_output_embeddings()
        special = {
            f"{name}.weight": kind
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not output
        }
    return int(compute_module_sizes(model, special_dtypes=special)[""])


def kept_bytes(config: RunConfig, task: Task) -> tuple[int, int]:
    """Return the bytes saved for the backward without checkpointing, and of the largest tensor."""
    dtype = models.weight_dtype(config) if config.mixed_precision == "no" else torch.bfloat16
    model, kind = empty_model(config, task, dtype)
    if config.method == "head":
        return 0, 0
    blocks, length = _blocks(model), _length(config, model)
    width, edited = model.get_input_embeddings().weight.shape[1], 0
    # the backward starts at the first edited layer, or at the embedding
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    first = [m for m in embeddings if m.embedding_dim == width]
    if config.method in REFT_METHODS:
        from reft_kernels.positions import parse

        spec = parse(config.positions)
        numbers = range(len(blocks)) if config.layers == "all" else config.layers
        rows = min((spec.first or 0) + (spec.last or 0) or length, length)
        edited = len(numbers) * config.batch_size * rows * width * dtype.itemsize
        first = [blocks[min(*numbers, len(blocks) - 1)]] if blocks else first
    elif config.method in ("lora", "dora"):
        model = _adapted(config, model, kind)
    for module in first:
        module.register_forward_hook(lambda module, args, output: _require_grad(output))
    fixed = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in fixed:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    tokens = torch.zeros(config.batch_size, length, dtype=torch.int64, device="meta")
    classes = kind == models.CLASSIFICATION
    labels = tokens[:, 0].to(dtype if task.labels is None else torch.int64) if classes else tokens
    options = {} if classes else {"use_cache": False}
    model.train()
    # silences messages about failures that are caught below
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    # without fake tensors transformers would read mask values
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with fake, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(input_ids=tokens, labels=labels, **options)
        sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
    except Exception:
        # data-dependent experts or GPU-only kernels: count linear layer outputs and the logits
        shapes = [tuple(m.weight.shape) for m in _matrices(model)]
        outputs = [min(shape) if shape[0] == width else shape[0] for shape in shapes]
        sizes = [tokens.numel() * dtype.itemsize * output for output in outputs]
    return sum(sizes) + edited, max(sizes, default=0)


def _require_grad(output: Any) -> Any:
    hidden = output[0] if isinstance(output, tuple) else output
    if not hidden.requires_grad:
        hidden.requires_grad_()
    return output


def _length(config: RunConfig, model: nn.Module) -> int:
    text = model.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return min(config.max_length, longest or config.max_length)


def _adapted(config: RunConfig, model: nn.Module, kind: str) -> nn.Module:
    heads = [name for name in models.HEADS if hasattr(model, name)]
    heads = heads if kind == models.CLASSIFICATION else []
    with warnings.catch_warnings():
        # initialization on the meta device warns that it does nothing
        warnings.simplefilter("ignore")
        return methods.adapt(config, models.Loaded(model, None, kind, heads))


def estimate(config: RunConfig, task: Task) -> Estimate:
    """Estimate the memory of a training with the given settings."""
    model, kind = empty_model(config, task, models.weight_dtype(config))
    numbers, frozen = sum(p.numel() for p in model.parameters()), _frozen_bytes(config, model)
    blocks, length = _blocks(model), _length(config, model)
    linear = sum(m.weight.numel() for part in blocks for m in _matrices(part))
    adapted = _adapted(config, model, kind)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    head = sum(p.numel() for name, p in trained.items() if "modules_to_save." in name)
    size = sum(p.numel() * p.element_size() for p in trained.values())
    kept, largest = kept_bytes(config, task)
    depth, mixed = max(1, len(blocks)), config.mixed_precision != "no"
    if config.gradient_checkpointing:  # saves the layers' inputs and recomputes one layer at a time
        width = model.get_input_embeddings().weight.shape[1] * (2 if mixed else 4)
        inputs = depth * config.batch_size * length * width
        kept = min(kept, inputs + max(2 * kept // depth, largest))
    # autocast copies of frozen weights
    activations = kept + 2 * largest + (2 * linear if mixed else 0)
    trainable = sum(p.numel() for p in trained.values()) - head
    return Estimate(numbers, trainable, head, frozen, size, size, 2 * size, activations, length)


def remedies(config: RunConfig, task: Task, memory: int, cuda: bool) -> list[tuple[str, Estimate]]:
    """Return settings that need less memory, with their estimates.

    Returns all that fit, or all that were tried if none fits.

    Args:
        memory: available bytes.
        cuda: whether there is a GPU, which quantization needs.
    """
    tried: dict[str, dict[str, Any]] = {}
    if not config.gradient_checkpointing:
        tried["--gradient-checkpointing"] = {"gradient_checkpointing": True}
    batch = config.batch_size
    while batch > 1 and estimate(config.replace(batch_size=batch), task).total > memory:
        batch //= 2
    if batch < config.batch_size:
        steps = config.accumulation * -(-config.batch_size // batch)
        changes = {"batch_size": batch, "accumulation": steps}
        tried[f"--batch-size {batch} --accumulation {steps}"] = changes
    if cuda and config.quantization == "none" and task.decoding is not None:
        tried["--quantization 4bit"] = {"quantization": "4bit"}
    found = [(flags, estimate(config.replace(**changes), task)) for flags, changes in tried.items()]
    return [pair for pair in found if pair[1].total <= memory] or found
