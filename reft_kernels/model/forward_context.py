"""The edits of one forward.

Each forward of a backbone creates one :class:`ForwardContext`. It holds the rows and weights of all
layers; layer hooks only apply them.

The context must outlive its forward, because gradient checkpointing runs the layer hooks again
during the backward. A hook on the autograd node of the backbone's output refers to the context;
layers that are recomputed after the backward has reached this node use it. This also works for
several forwards followed by several backwards.

A reentrant checkpoint runs the backward of a layer outside the graph in which the weights of all
layers were built. These layers use detached weights. At the end of the whole backward, the
gradients of the detached weights are backpropagated through one build, so that each parameter
receives its gradient once, as ``DistributedDataParallel`` requires.

Gradient checkpointing makes the embeddings require gradients, and with them every layer, also those
below the first edit. Where nothing below it is trained, the first edit detaches its hidden state,
so that these layers are neither recomputed nor part of the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from reft_kernels.arguments import BuiltWeights
from reft_kernels.interventions import EditWeights, RedWeights
from reft_kernels.model.cached_edits import CachedEdit
from reft_kernels.model.components import Target
from reft_kernels.model.scaled_selection import scaled_red
from reft_kernels.model.selection import DeferredSelection, Selection, TokenShape, place_rows

Weights = EditWeights | RedWeights
_TOKENS_FIRST = ("btd", "btd_padded")


class EditSource(Protocol):
    """What owns an edit's weights: a stacked intervention, or a bank of several."""

    def __call__(self) -> Sequence[Weights]:
        """Build the weights of all layers."""

    def edit(
        self,
        hidden: Tensor,
        weights: Weights,
        *,
        rows: Tensor | None = None,
        weight_ids: Tensor | None = None,
        coeff: Tensor | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """Edit hidden states with one layer's weights."""


class Edit:
    """One edit of one layer in one forward, by one adapter or by a group of adapters.

    Attributes:
        stack: the owner of the weights of all layers of one width.
        index: index of the layer in the stack.
        weights: the built weights of the layer.
        selection: rows to edit; deferred if they depend on the shape of the hidden state.
        tokens: ``(B, T)`` of the tokens that the rows refer to; None for a deferred selection.
        device: device of the weights.
        detached: detached copies of ``weights``, for layers under a reentrant checkpoint.
    """

    __slots__ = ("stack", "index", "weights", "selection", "tokens", "device", "detached")

    def __init__(
        self,
        stack: EditSource,
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
        """The weights as detached leaves that accumulate gradients."""
        if self.detached is None:
            kind: Any = type(self.weights)
            detached = kind(
                *(
                    t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
                    for t in self.weights
                )
            )
            if isinstance(self.weights, BuiltWeights):  # recomputes what the forward computed
                detached.rounded = self.weights.rounded
            self.detached = detached
        return self.detached


class ForwardContext:
    """The edits of one forward and the state that its layer hooks share.

    Args:
        edits: for each site, the edits in the order in which they apply.
        has_graph: whether gradients are enabled around the forward.
        shared: whether the weights come from a build that several forwards share.
    """

    def __init__(self, edits: dict[int, list[Edit]], has_graph: bool, shared: bool = False) -> None:
        self.edits = edits
        self.has_graph = has_graph
        self.shared = shared
        self.reentrant = False  # a layer ran without gradients: a reentrant checkpoint
        self.ran: set[int] = set()  # sites whose hook ran
        self.training = False  # whether an adapter is trained
        self.cache: Any = None  # the key-value cache that the forward fills
        self.records: list[CachedEdit] = []  # edited columns that the forward adds to the cache
        # whether nothing that is trained enters the first edit; called if its input has a graph
        self.untrained_below: Callable[[], bool] | None = None
        self.first_detached: int | None = None  # the site whose input was detached
        self._collecting = False  # a backward will flush the detached weights at its end
        # selections for other layouts and devices; values keep the key's selection alive
        self._moved: dict[tuple, tuple[Selection | None, Selection]] = {}

    def apply(self, site: int, hidden: Any, inplace: bool, target: Target) -> Tensor:
        """Apply the edits of one site in order.

        Args:
            site: number of the site, a key of ``edits``.
            hidden: the module's input or output; must be a tensor ``[..., target.embed_dim]``.
            inplace: whether ``hidden`` may be edited in place; requires that nothing else reads it.
            target: the target of the site.

        Returns:
            The edited hidden state, of the same shape and dtype.

        Raises:
            ValueError: ``hidden`` is not a hidden state of this width, or its shape does not fit
                the tokens that the rows refer to.
            RuntimeError: the backward of a reentrant checkpoint did not pass through the output.
        """
        if (
            not isinstance(hidden, Tensor)
            or hidden.dim() < 2
            or hidden.shape[-1] != target.embed_dim
        ):
            raise unexpected_output(hidden, target)
        graph = torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            inplace = False  # the compiler plans memory reuse
        else:
            if self.has_graph and not graph:
                self.reentrant = True
            if hidden.requires_grad and not self.reentrant and self._detaches(site):
                hidden = hidden.detach()
            self.ran.add(site)
            # a view shares memory with its base; autograd forbids in-place edits of a leaf
            inplace = (
                inplace and not hidden._is_view() and not (hidden.requires_grad and hidden.is_leaf)
            )
        # if hidden is [B, T, d] of the same tokens, its rows need no conversion
        lead = hidden.shape[:-1] if target.layout in _TOKENS_FIRST else None
        for edit in self.edits.get(site, ()):
            weights = edit.weights
            if self.reentrant and graph:
                if not self._collecting and torch._C._current_graph_task_id() >= 0:
                    raise RuntimeError(
                        "reentrant gradient checkpointing: the backward did not come through the "
                        "model's output; compute the loss from it, or use use_reentrant=False"
                    )
                weights = edit.leaves()
            if isinstance(edit.selection, DeferredSelection):
                deferred = edit.selection.select(hidden)
                if deferred is None:
                    continue
                selection = deferred
            elif edit.tokens is None or lead == edit.tokens:
                selection = edit.selection
            else:
                selection = self._placed(edit.selection, edit.tokens, hidden, target)
            rows, weight_ids, coeff, strengths = selection
            if edit.device != hidden.device or (rows is not None and rows.device != hidden.device):
                kind: Any = type(weights)
                weights = kind(*(self._to(t, hidden.device) for t in weights))
                rows, weight_ids, coeff, strengths = self.selection_on(selection, hidden.device)
            if strengths is not None and isinstance(weights, RedWeights):
                weights = scaled_red(weights, strengths, weight_ids is not None)
            hidden = edit.stack.edit(
                hidden, weights, rows=rows, weight_ids=weight_ids, coeff=coeff, inplace=inplace
            )
        return hidden

    def _detaches(self, site: int) -> bool:
        """Whether to detach the input of a site: that of the first edit, also when recomputed."""
        if not self.ran and self.untrained_below is not None and self.untrained_below():
            self.first_detached = site
        return site == self.first_detached and (
            not self.ran or torch._C._current_graph_task_id() >= 0
        )

    def enter_backward(self) -> None:
        """Schedule the gradients of detached weights for the end of the running backward.

        Called when a backward reaches the output of the backbone.
        """
        if self.reentrant and not self._collecting:
            self._collecting = True
            torch.autograd.Variable._execution_engine.queue_callback(self._flush_detached)

    def _flush_detached(self) -> None:
        """Backpropagate the gradients of detached weights through one build per stack."""
        self._collecting = False
        by_stack: dict[EditSource, list[Edit]] = {}
        for edit in (e for edits in self.edits.values() for e in edits if e.detached is not None):
            by_stack.setdefault(edit.stack, []).append(edit)
        for stack, edits in by_stack.items():
            with torch.enable_grad():
                built: Any = (
                    {edit.index: edit.weights for edit in edits} if self.shared else stack()
                )
            outputs: list[Tensor] = []
            grads: list[Tensor] = []
            for edit in edits:
                for weight, leaf in zip(built[edit.index], edit.leaves(), strict=True):
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
        """The selection as rows of a hidden state of another layout; cached per layout."""
        if torch.compiler.is_compiling():
            placed = place_rows(selection, tokens, hidden, target.layout)
        else:
            key = (id(selection), tuple(hidden.shape[:-1]), target.layout)
            if key not in self._moved:
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

    def selection_on(self, selection: Selection, device: torch.device) -> Selection:
        """The selection on another device; copied once per device."""
        key = (id(selection), device)
        moved = self._moved[key][0] if key in self._moved else None
        if moved is None:
            moved = Selection(*(self._to(t, device) for t in selection))
            self._moved[key] = (moved, selection)
        return moved


def unexpected_output(hidden: Any, target: Target) -> ValueError:
    """The error for a module whose input or output is not a hidden state of the target's width."""
    got = f"shape {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
    return ValueError(
        f"component: the {target.side} of {target.path!r} is {got}, expected a hidden state "
        f"[..., {target.embed_dim}]; name another component, or pass its width: "
        "ReftConfig(embed_dim=...)"
    )
