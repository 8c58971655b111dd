"""Whole models with LoReFT: frozen, as a PEFT method of reft_kernels, and by PyTorch forward hooks.

All providers of a run share one set of frozen parameters and start from the same R, W and b, so
that losses and gradients can be compared before timing.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks import edits
from benchmarks.protocol import AccuracyCheck, Call, Provider
from benchmarks.torch_loreft import TorchLoReFT
from reft_kernels import positions
from reft_kernels.interventions import StackedLoReFT

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Shape:
    """A Llama-like model and its batch.

    The second half of each sequence is the answer.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    batch: int
    length: int
    spec: str = "f7+l7"
    rank: int = 8
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    compiled: bool = False

    def cut(self, layers: int) -> Shape:
        """Return the same shape with at most ``layers`` layers."""
        return replace(self, layers=min(layers, self.layers))

    @property
    def dimensions(self) -> dict[str, object]:
        """The ``name=value`` pairs of the shape column."""
        switches = {name: 1 for name in ("checkpointing", "compiled") if getattr(self, name)}
        return {
            "model": self.name,
            "batch": self.batch,
            "T": self.length,
            "positions": self.spec,
            "r": self.rank,
        } | switches


@dataclass(frozen=True)
class PaddedBatch:
    """A batch with one example per row.

    Attributes:
        input_ids, labels, attention_mask: ``[B, T]``.
        rows: Rows of the flattened hidden state to edit, int64 ``[B * P]``.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    rows: Tensor

    @property
    def columns(self) -> Tensor:
        """The edited columns of each sequence, ``[B, P]``. Every sequence must have as many."""
        return self.rows.view(self.input_ids.shape[0], -1) % self.input_ids.shape[1]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of a causal language model."""
        return {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "attention_mask": self.attention_mask,
        }


@dataclass(frozen=True)
class PackedBatch:
    """A batch whose rows hold several examples each.

    The edited positions follow from the position ids and the labels.

    Attributes:
        inputs: Keyword arguments of a causal language model.
    """

    inputs: dict[str, Tensor]


Weights = Sequence[tuple[Tensor, Tensor, Tensor]]


def llama(shape: Shape, device: str) -> nn.Module:
    """Return a frozen Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=max(512, shape.length),
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(shape.dtype)
        try:
            return LlamaForCausalLM(config).requires_grad_(False)
        finally:
            torch.set_default_dtype(default)


def batch(shape: Shape, device: str, number: int = 0, whole: bool = False) -> PaddedBatch:
    """Return the ``number``-th batch of random tokens.

    Args:
        shape: Model and batch size.
        device: Device of the tensors.
        number: Seed of the tokens.
        whole: Select positions in the whole sequence instead of in its prompt.
    """
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, shape.vocabulary, (shape.batch, shape.length), generator=generator).to(
        device
    )
    labels, half = ids.clone(), shape.length // 2
    labels[:, :half] = -100
    rows = positions.resolve(
        shape.spec, [shape.length if whole else half] * shape.batch, shape.length, device=device
    )
    return PaddedBatch(ids, labels, torch.ones_like(ids), rows[rows >= 0].long())


def collated(inputs: Mapping[str, Tensor], spec: str, device: str) -> PaddedBatch:
    """Return the batch of padded ``input_ids``, ``labels`` and ``attention_mask``, ``[B, T]``.

    The padding is on the right, and labels start after the prompt.
    """
    ids, labels, mask = (
        inputs[name].to(device) for name in ("input_ids", "labels", "attention_mask")
    )
    rows = positions.resolve(spec, positions.prompt_lengths_from_labels(labels, mask), ids.shape[1])
    return PaddedBatch(ids, labels, mask, rows[rows >= 0].long())


def weights(shape: Shape, device: str) -> Weights:
    """Return R, W and b of each layer in fp32, where R and W differ."""
    torch.manual_seed(1)
    return [edits.weights(shape.hidden, shape.rank, device) for _ in range(shape.layers)]


def shallow_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model that shares its parameters and buffers."""
    kept = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, kept)


@dataclass
class Stepper:
    """The model of one provider in training.

    Attributes:
        loss: Returns the loss of a batch, with its autograd graph.
        parameters: Trained parameters.
        gradients: Returns the gradient of each layer's W after a backward pass.
        around: Returns a context to enter around forward and backward.
    """

    loss: Callable[[PaddedBatch | PackedBatch], Tensor]
    parameters: list[nn.Parameter]
    gradients: Callable[[], list[Tensor]]
    around: Callable[[], AbstractContextManager] = field(default=contextlib.nullcontext)
    optimizer: torch.optim.Optimizer | None = None

    def step(self, batch: PaddedBatch | PackedBatch) -> Tensor:
        """Run forward, backward and an AdamW update. Returns the detached loss."""
        if self.parameters and self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=0.0)
        if self.optimizer:
            self.optimizer.zero_grad(set_to_none=True)
        with self.around():
            loss = self.loss(batch)
            loss.backward()
        if self.optimizer:
            self.optimizer.step()
        return loss.detach()


def _switched(model: nn.Module, shape: Shape) -> nn.Module:
    model.train()
    if shape.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return torch.compile(model, dynamic=False) if shape.compiled else model


def frozen(model: nn.Module, shape: Shape) -> Stepper:
    """Return the step of the frozen model: its forward, and its backward to the embeddings.

    Any method that edits hidden states inside the model has this cost.
    """
    model = shallow_copy(model)
    embed, run = model.get_input_embeddings(), _switched(model, shape)

    def loss(batch: PaddedBatch) -> Tensor:
        embedded = embed(batch.input_ids).requires_grad_()
        return run(
            inputs_embeds=embedded, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss

    return Stepper(loss, [], list)


@torch.no_grad()
def peft_model(model: nn.Module, shape: Shape, weights: Weights) -> tuple[nn.Module, StackedLoReFT]:
    """Return a model with reft_kernels' PEFT method, and the module that holds its weights."""
    from peft import get_peft_model

    from reft_kernels.integrations.peft import ReftConfig

    model = get_peft_model(
        shallow_copy(model), ReftConfig(layers="all", rank=shape.rank, positions=shape.spec)
    )
    (stack,) = (module for module in model.modules() if isinstance(module, StackedLoReFT))
    R, W, b = (torch.stack(kind) for kind in zip(*weights, strict=True))
    stack.set_R(R)
    stack.W.copy_(W)
    stack.b.copy_(b)
    return model, stack


def supervise(model: nn.Module) -> None:
    """Let a model compute the logits of supervised tokens only, for good."""
    from reft_kernels.integrations.peft import keep_supervised_logits

    keep_supervised_logits(model)


def peft_stepper(
    model: nn.Module, shape: Shape, weights: Weights, supervised: bool = False
) -> Stepper:
    """Return the step of reft_kernels as a PEFT method, with all logits or supervised ones."""
    model, stack = peft_model(model, shape, weights)
    if supervised:
        supervise(model)
    run = _switched(model, shape)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Stepper(lambda batch: run(**batch.inputs).loss, trained, lambda: list(stack.W.grad))


class _Eager(TorchLoReFT):
    """Plain PyTorch LoReFT with the default orthogonal parametrization."""

    def __init__(self, R: Tensor, W: Tensor, b: Tensor, dtype: torch.dtype) -> None:
        with R.device:
            super().__init__(R, use_trivialization=True)
        with torch.no_grad():
            self.source.weight.copy_(W)
            self.source.bias.copy_(b)
        if dtype == torch.float64:
            self.double()

    def forward(self, h: Tensor) -> Tensor:
        return edits.eager_unfolded(h, self.rotate.weight, self.source.weight, self.source.bias)


def hooks_stepper(
    model: nn.Module, shape: Shape, weights: Weights, cached: bool = False
) -> Stepper:
    """Return the step of forward hooks that gather, edit and scatter.

    With ``cached=True``, R is built once per step by ``parametrize.cached()``.
    """
    model = shallow_copy(model)
    layer_edits = nn.ModuleList(
        _Eager(*triple, next(model.parameters()).dtype) for triple in weights
    )
    rows: list[Tensor] = []

    def hook(edit: nn.Module) -> Callable:
        def edit_output(module: nn.Module, args: tuple, output: object) -> object:
            hidden = output[0] if isinstance(output, tuple) else output
            flat = hidden.reshape(-1, hidden.shape[-1])
            edited = flat.index_copy(0, rows[0], edit(flat.index_select(0, rows[0]))).view_as(
                hidden
            )
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return edit_output

    for layer, edit in zip(model.model.layers, layer_edits, strict=True):
        layer.register_forward_hook(hook(edit))
    run = _switched(model, shape)

    def loss(batch: PaddedBatch) -> Tensor:
        rows[:] = [batch.rows]
        return run(**batch.inputs).loss

    around = parametrize.cached if cached else contextlib.nullcontext
    return Stepper(
        loss,
        list(layer_edits.parameters()),
        lambda: [edit.source.weight.grad for edit in layer_edits],
        around,
    )


def provider(
    make: Callable[[], Stepper],
    batches: Sequence[PaddedBatch | PackedBatch],
    check: Callable[[], AccuracyCheck] | None = None,
) -> Provider:
    """Return a provider that times training steps on each batch.

    The model is built by ``make`` when it is first needed.
    """
    built = functools.cache(make)

    def prepare(k: int) -> Call:
        stepper = built()
        return Call(lambda _: stepper.step(batches[k]), capturable=False, countable=False)

    return Provider(prepare, check)
