"""Whole models with LoReFT by everyone: frozen, reft_kernels as a PEFT method, and forward hooks in
plain PyTorch.

All providers of a run share one set of frozen parameters and start from the same R, W and b, so
that losses and gradients can be compared before anything is timed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from reft_train.demo.baselines import TorchLoReFT
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks import edits
from benchmarks.harness import Call, Provider, Verdict
from reft_kernels import positions
from reft_kernels.interventions import StackedLoReFT

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Shape:
    """A Llama-like model and the batch that it gets: right half of each sequence is the answer."""

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
        """The same with fewer layers."""
        return replace(self, layers=min(layers, self.layers))

    @property
    def dimensions(self) -> dict[str, object]:
        """The ``name=value`` pairs of a result row."""
        switches = {name: 1 for name in ("checkpointing", "compiled") if getattr(self, name)}
        return {
            "model": self.name,
            "batch": self.batch,
            "T": self.length,
            "positions": self.spec,
            "r": self.rank,
        } | switches


@dataclass(frozen=True)
class Batch:
    """``input_ids``, ``labels``, ``attention_mask [B, T]``, and what is edited: rows of the
    hidden state, int64 ``[B * P]``.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    rows: Tensor

    @property
    def columns(self) -> Tensor:
        """The rows as columns of each sequence, ``[B, P]``, where each has as many."""
        return self.rows.view(self.input_ids.shape[0], -1) % self.input_ids.shape[1]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a causal LM takes."""
        return {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "attention_mask": self.attention_mask,
        }


@dataclass(frozen=True)
class Packed:
    """A batch whose examples share rows: what a causal LM takes. Position ids and labels tell
    what is edited.
    """

    inputs: dict[str, Tensor]


Weights = Sequence[tuple[Tensor, Tensor, Tensor]]


def llama(shape: Shape, device: str) -> nn.Module:
    """A frozen Llama with random weights."""
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


def batch(shape: Shape, device: str, number: int = 0, whole: bool = False) -> Batch:
    """The ``number``-th batch of random tokens; ``whole`` takes the entire sequence for the
    prompt when it selects rows.
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
    return Batch(ids, labels, torch.ones_like(ids), rows[rows >= 0].long())


def collated(inputs: Mapping[str, Tensor], spec: str, device: str) -> Batch:
    """A batch of ``input_ids``, ``labels`` and ``attention_mask [B, T]`` padded on the right;
    labels begin after the prompt.
    """
    ids, labels, mask = (
        inputs[name].to(device) for name in ("input_ids", "labels", "attention_mask")
    )
    rows = positions.resolve(spec, positions.prompt_lengths_from_labels(labels, mask), ids.shape[1])
    return Batch(ids, labels, mask, rows[rows >= 0].long())


def weights(shape: Shape, device: str) -> Weights:
    """R, W, b of each layer in fp32, where R and W differ."""
    torch.manual_seed(1)
    return [edits.weights(shape.hidden, shape.rank, device) for _ in range(shape.layers)]


def sharing(model: nn.Module) -> nn.Module:
    """A copy of a model with the same parameters and buffers, not copies of them."""
    kept = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, kept)


@dataclass
class Stepper:
    """One provider's model in training.

    Attributes:
        loss: of a batch, in the graph.
        parameters: what is trained.
        gradients: of W of each layer, after a backward.
        around: entered around forward and backward.
    """

    loss: Callable[[Batch | Packed], Tensor]
    parameters: list[nn.Parameter]
    gradients: Callable[[], list[Tensor]]
    around: Callable[[], AbstractContextManager] = field(default=contextlib.nullcontext)
    optimizer: torch.optim.Optimizer | None = None

    def step(self, batch: Batch | Packed) -> Tensor:
        """Forward, backward, AdamW."""
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
    """The frozen model's forward, and its backward to the embeddings: what any edit inside the
    model has to pay.
    """
    model = sharing(model)
    embed, run = model.get_input_embeddings(), _switched(model, shape)

    def loss(batch: Batch) -> Tensor:
        embedded = embed(batch.input_ids).requires_grad_()
        return run(
            inputs_embeds=embedded, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss

    return Stepper(loss, [], list)


@torch.no_grad()
def tuned(model: nn.Module, shape: Shape, weights: Weights) -> tuple[nn.Module, StackedLoReFT]:
    """A model under our PEFT method with given weights, and the stack that holds them."""
    from peft import get_peft_model

    from reft_kernels.integrations.peft import ReftConfig

    model = get_peft_model(
        sharing(model), ReftConfig(layers="all", rank=shape.rank, positions=shape.spec)
    )
    (stack,) = (module for module in model.modules() if isinstance(module, StackedLoReFT))
    R, W, b = (torch.stack(kind) for kind in zip(*weights, strict=True))
    stack.set_R(R)
    stack.W.copy_(W)
    stack.b.copy_(b)
    return model, stack


def by_peft(model: nn.Module, shape: Shape, weights: Weights) -> Stepper:
    """reft_kernels as a PEFT method."""
    model, stack = tuned(model, shape, weights)
    run = _switched(model, shape)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Stepper(lambda batch: run(**batch.inputs).loss, trained, lambda: list(stack.W.grad))


class _Eager(TorchLoReFT):
    """The demo's plain edit with PyTorch's default parametrization, in the hidden state's dtype."""

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


def by_hooks(model: nn.Module, shape: Shape, weights: Weights, cached: bool = False) -> Stepper:
    """Forward hooks that gather, edit and scatter; with ``cached`` R is built once a step, by
    ``parametrize.cached()``.
    """
    model = sharing(model)
    own = nn.ModuleList(_Eager(*triple, next(model.parameters()).dtype) for triple in weights)
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

    for layer, edit in zip(model.model.layers, own, strict=True):
        layer.register_forward_hook(hook(edit))
    run = _switched(model, shape)

    def loss(batch: Batch) -> Tensor:
        rows[:] = [batch.rows]
        return run(**batch.inputs).loss

    around = parametrize.cached if cached else contextlib.nullcontext
    return Stepper(
        loss, list(own.parameters()), lambda: [edit.source.weight.grad for edit in own], around
    )


def provider(
    make: Callable[[], Stepper],
    batches: Sequence[Batch | Packed],
    check: Callable[[], Verdict] | None = None,
) -> Provider:
    """Time training steps on each batch, of one model that is made when first needed."""
    built = functools.cache(make)

    def prepare(k: int) -> Call:
        stepper = built()
        return Call(lambda _: stepper.step(batches[k]), capturable=False, countable=False)

    return Provider(prepare, check)
