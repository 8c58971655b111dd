"""The edits of one forward.

A :class:`ForwardContext` is made once for each forward of a backbone. Layer hooks read it and
compute nothing about positions or weights themselves.

A context outlives its forward, because recomputation (gradient checkpointing) runs layer hooks
again during the backward. A hook on the autograd node that produced the backbone's output holds the
context; when the backward reaches that node, recomputed layers get this context. Two forwards
before two backwards therefore each get their own.

A reentrant checkpoint runs a layer's backward by itself, outside the graph in which the weights of
all layers were built. Such layers use detached weights. When the whole backward ends, the gradients
of the detached weights go through one build to the parameters, so that each parameter gets its
gradient once, as data parallelism expects.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reft_kernels.interventions import EditWeights, Intervention, RedWeights
from reft_kernels.model.caches import CachedEdit
from reft_kernels.model.components import Target
from reft_kernels.model.selection import DeferredSelection, Selection, TokenShape, place_rows

Weights = EditWeights | RedWeights
_TOKENS_FIRST = ("btd", "btd_padded")


class Edit:
    """One adapter's edit of one layer in one context.

    Attributes:
        stack: the module that holds the weights of all layers of one width.
        index: of the layer in the stack.
        weights: the layer's built weights.
        selection: rows to edit; deferred where they are counted from the hidden state's own shape.
        tokens: ``[B, T]`` that the rows were counted for; None for a deferred selection.
        device: of the weights.
        detached: leaves in place of ``weights``, for layers under a reentrant checkpoint.
    """

    __slots__ = ("stack", "index", "weights", "selection", "tokens", "device", "detached")

    def __init__(
        self,
        stack: Intervention,
        index: int,
        weights: Weights,
        selection: Selection | DeferredSelection,
        tokens: TokenShape | None,
        device: torch.device,
    ) -> None:
        self.stack = stack
        self.index = index
        self.weights = weights
        self.selection = selection
        self.tokens = tokens
        self.device = device
        self.detached: Weights | None = None

    def leaves(self) -> Weights:
        """The weights as leaves that collect gradients."""
        if self.detached is None:
            made = (
                t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
                for t in self.weights
            )
            self.detached = type(self.weights)(*made)
        return self.detached


class ForwardContext:
    """State of one forward for its layer hooks: for each site, the edits in order."""

    def __init__(self, edits: dict[int, list[Edit]], has_graph: bool, shared: bool = False) -> None:
        self.edits = edits
        self.has_graph = has_graph  # gradients were enabled around the forward
        self.shared = shared  # weights come from one build for several forwards
        self.reentrant = False  # a layer ran without gradients: a reentrant checkpoint
        self.ran: set[int] = set()  # sites that ran
        self.training = False  # one of the adapters is being trained
        self.cache: Any = None  # the key-value cache that the forward fills
        self.records: list[CachedEdit] = []  # edited columns that the forward adds to the cache
        self._collecting = False
        self._moved: dict[tuple, tuple[Selection, Selection]] = {}

    def apply(self, site: int, hidden: Any, inplace: bool, target: Target) -> Tensor:
        """Apply the edits of one site in order.

        Args:
            site: number of the site, a key of ``edits``.
            hidden: what the module took or returned there; expected: a tensor
                ``[..., target.embed_dim]``.
            inplace: nothing else reads ``hidden``, so it may be edited in place.

        Raises:
            ValueError: ``hidden`` is no hidden state of this width, or not the tensor that the
                selection's rows were counted for.
            RuntimeError: a reentrant checkpoint's backward did not come through the output.
        """
        if (
            not isinstance(hidden, Tensor)
            or hidden.dim() < 2
            or hidden.shape[-1] != target.embed_dim
        ):
            raise unexpected_output(hidden, target)
        graph = torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            inplace = False  # the compiler decides which memory to reuse
        else:
            # a view may share memory that others read; autograd forbids editing a leaf in place
            inplace = (
                inplace and not hidden._is_view() and not (hidden.requires_grad and hidden.is_leaf)
            )
            self.ran.add(site)
            if self.has_graph and not graph:
                self.reentrant = True
        # rows counted for [B, T] are rows of a [B, T, d] tensor as they are
        counted_for = hidden.shape[:-1] if target.layout in _TOKENS_FIRST else None
        for edit in self.edits.get(site, ()):
            selection, weights = edit.selection, edit.weights
            if self.reentrant and graph:
                if not self._collecting and torch._C._current_graph_task_id() >= 0:
                    raise RuntimeError(
                        "reentrant gradient checkpointing: the backward did not come through the "
                        "model's output; compute the loss from it, or use use_reentrant=False"
                    )
                weights = edit.leaves()
            if isinstance(selection, DeferredSelection):
                selection = selection.select(hidden)
                if selection is None:
                    continue
            elif counted_for != edit.tokens:
                selection = self._placed(selection, edit.tokens, hidden, target)
            rows, weight_ids = selection
            if edit.device != hidden.device or (rows is not None and rows.device != hidden.device):
                weights = type(weights)(*(self._to(t, hidden.device) for t in weights))
                rows, weight_ids = self._on(selection, hidden.device)
            hidden = edit.stack.edit(
                hidden, weights, rows=rows, weight_ids=weight_ids, inplace=inplace
            )
        return hidden

    def enter_backward(self) -> None:
        """Called when a backward reaches the backbone.

        Queues the gradients of detached weights for the end of that backward.
        """
        if self.reentrant and not self._collecting:
            self._collecting = True
            torch.autograd.Variable._execution_engine.queue_callback(self._carry_back)

    def _carry_back(self) -> None:
        self._collecting = False
        by_stack: dict[Intervention, list[Edit]] = {}
        for edit in (e for edits in self.edits.values() for e in edits if e.detached is not None):
            by_stack.setdefault(edit.stack, []).append(edit)
        for stack, edits in by_stack.items():
            with torch.enable_grad():
                built = {edit.index: edit.weights for edit in edits} if self.shared else stack()
            outputs, grads = [], []
            for edit in edits:
                for weight, leaf in zip(built[edit.index], edit.detached, strict=True):
                    if isinstance(leaf, Tensor) and leaf.grad is not None:
                        outputs.append(weight)
                        grads.append(leaf.grad)
                edit.detached = None
            if outputs:
                torch.autograd.backward(outputs, grads)

    @staticmethod
    def _to(value: Any, device: torch.device) -> Any:
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

    def _placed(
        self, selection: Selection, tokens: TokenShape, hidden: Tensor, target: Target
    ) -> Selection:
        """The selection for a hidden state of another layout, computed once for each layout."""
        if torch.compiler.is_compiling():
            placed = place_rows(selection, tokens, hidden, target.layout)
        else:
            key = (id(selection), tuple(hidden.shape[:-1]), target.layout)
            if key not in self._moved:  # holds the selection too, so that its id is not reused
                self._moved[key] = (place_rows(selection, tokens, hidden, target.layout), selection)
            placed = self._moved[key][0]
        if placed is None:
            raise ValueError(
                f"component: the {target.side} of {target.path!r} has shape "
                f"{tuple(hidden.shape)}, expected hidden states of "
                f"the {tuple(tokens)} tokens [B, T] that the positions were counted for; name a "
                "component on the token stream"
            )
        return placed

    def _on(self, selection: Selection, device: torch.device) -> Selection:
        """The selection on another device, copied once by the first layer there."""
        key = (id(selection), device)
        if key not in self._moved:
            rows, weight_ids = (self._to(t, device) for t in selection)
            self._moved[key] = (Selection(rows, weight_ids), selection)
        return self._moved[key][0]


def unexpected_output(hidden: Any, target: Target) -> ValueError:
    """The error for a module whose input or output is no hidden state of the expected width."""
    got = f"shape {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
    return ValueError(
        f"component: the {target.side} of {target.path!r} is {got}, expected a hidden state "
        f"[..., {target.embed_dim}]; name another component, or state its width: "
        "ReftConfig(embed_dim=...)"
    )
