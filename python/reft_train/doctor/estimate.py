"""Estimate of a training's weights, gradients and optimizer states, without reading weights.

The model is built on PyTorch's meta device and measured by accelerate. Activations are not
estimated; the trial measures them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from accelerate.utils import CustomDtype
from accelerate.utils.modeling import compute_module_sizes
from torch import nn

from reft_train import methods, models
from reft_train.config import RunConfig
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
    length: int

    @property
    def total(self) -> int:
        """Bytes of the weights, the gradients and Adam's two moments."""
        return self.frozen + 4 * self.trained


def empty_model(config: RunConfig, task: Task) -> models.Loaded:
    """Build the frozen model on the meta device from ``config.json``."""
    hf_config = models.model_config(config)
    kind = models.kind_of(config, hf_config, task)
    if kind == models.CLASSIFICATION:
        hf_config.num_labels = task.num_labels
    build, dtype = models.class_of(config, kind).from_config, models.weight_dtype(config)
    try:
        with torch.device("meta"):
            model = build(hf_config, dtype=dtype)
            if config.pooling == "mean":
                model = models.MeanPooledClassifier(model, hf_config.num_labels, config.seed)
    except (ValueError, KeyError, ImportError) as error:
        raise wrong("model", f"{config.model!r}", f"a known model ({one_line(error)})") from None
    heads = [name for name in models.HEADS if hasattr(model, name)]
    heads = heads[:1] if kind == models.CLASSIFICATION else []
    return models.Loaded(model.requires_grad_(False), None, kind, heads)


def estimate(config: RunConfig, task: Task) -> Estimate:
    """Estimate the memory of a training's weights with the given settings."""
    loaded = empty_model(config, task)
    model, special = loaded.model, {}
    numbers = sum(p.numel() for p in model.parameters())
    if config.quantization != "none":
        kind = CustomDtype.INT4 if config.quantization == "4bit" else torch.int8
        output = model.get_output_embeddings()
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m != output]
        special = {f"{name}.weight": kind for name in linear}
    frozen = int(compute_module_sizes(model, special_dtypes=special)[""])
    length = min(config.max_length, models.positions_of(model.config) or config.max_length)
    with warnings.catch_warnings():
        # initialization on the meta device warns that it does nothing
        warnings.simplefilter("ignore")
        adapted = methods.adapt(config, loaded)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    head = sum(p.numel() for name, p in trained.items() if "modules_to_save." in name)
    size = sum(p.numel() * p.element_size() for p in trained.values())
    trainable = sum(p.numel() for p in trained.values()) - head
    return Estimate(numbers, trainable, head, frozen, size, length)
