"""One forward's edits and the hooks that apply them: a layer's hook only consumes what its context
holds.

A context outlives its forward, because recomputation (gradient checkpointing) runs layer hooks
again during the backward. It is
kept by the graph itself: a hook on the node that produced the backbone's output holds it, and,
called when the backward enters that backbone, makes it the context that recomputed layers consume.
So two forwards before two backwards each get their own.

A reentrant checkpoint runs a layer's backward by itself, cut off from the graph in which the
weights of all layers were built.
Such layers consume detached weights, whose gradients are carried back through one build when the
whole backward ends: the parameters get their gradient once, as data parallelism expects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reft_kernels.interventions import EditWeights, Intervention, RedWeights
from reft_kernels.model.caches import CachedEdit
from reft_kernels.model.components import Target
from reft_kernels.model.selection import DeferredSelection, Selection, TokenShape, place_rows

if TYPE_CHECKING:
    from reft_kernels.model.editor import BackboneSession

Weights = EditWeights | RedWeights


class Edit:
    """One adapter's edit of one layer in one context.

    ``tokens`` is the shape that the selection's rows were counted for; None for a selection that
    waits for the hidden state.
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
        self.device = device  # of the weights
        self.detached: Weights | None = (
            None  # leaves in their place, while layers run their backward by themselves
        )

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
    """What the hooks of one forward consume: for each site, its edits in order."""

    def __init__(self, edits: dict[int, list[Edit]], has_graph: bool, shared: bool = False) -> None:
        self.edits = edits
        self.has_graph = has_graph  # gradients are on around the forward
        # the weights come from a build for several forwards, so what they collect goes there
        self.shared = shared
        # a layer ran without them all the same: a reentrant checkpoint, which will run it again
        self.reentrant = False
        self.ran: set[int] = set()
        self.training = False  # an adapter that it edits for is being trained
        self.cache: Any = None  # the cache that the forward fills, and
        self.records: list[CachedEdit] = []  # what it puts there
        self._collecting = False
        self._moved: dict[tuple, tuple[Selection, Selection]] = {}

    def apply(self, site: int, hidden: Tensor, inplace: bool, target: Target) -> Tensor:
        """Edit the hidden state of one place.

        Raises:
            ValueError: the hidden state is not the tensor that the selection's rows were counted
                for.
        """
        graph = torch.is_grad_enabled()
        if not torch.compiler.is_compiling():
            self.ran.add(site)
            if self.has_graph and not graph:
                self.reentrant = True
        for edit in self.edits.get(site, ()):
            selection, weights = edit.selection, edit.weights
            if self.reentrant and graph:
                if not self._collecting and torch._C._current_graph_task_id() >= 0:
                    raise RuntimeError(
                        "reentrant gradient checkpointing: the backward did not come through the "
                        "model's output; "
                        "compute the loss from it, or use use_reentrant=False"
                    )
                weights = edit.leaves()
            if isinstance(selection, DeferredSelection):
                selection = selection.select(hidden)
                if selection is None:
                    continue
            elif not _is_plain(hidden, edit.tokens, target):
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
        """A backward has reached this context's backbone: when it ends, gradients of detached
        weights go to the parameters.
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
        """The batch's rows on a hidden state of another layout, counted once for all layers that
        have it.
        """
        if torch.compiler.is_compiling():
            placed = place_rows(selection, tokens, hidden, target.layout)
        else:
            key = (id(selection), tuple(hidden.shape[:-1]), target.layout)
            if key not in self._moved:  # the selection is kept beside, so that its id stays its own
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
        """The batch's rows on another device: copied once, by the first layer there."""
        key = (id(selection), device)
        if key not in self._moved:
            rows, weight_ids = (self._to(t, device) for t in selection)
            self._moved[key] = (Selection(rows, weight_ids), selection)
        return self._moved[key][0]


def _is_plain(hidden: Tensor, tokens: TokenShape, target: Target) -> bool:
    """Whether rows counted for ``[B, T]`` are rows of ``hidden`` as they are: the sizes alone
    are compared.
    """
    shape = hidden.shape
    return (
        target.layout in ("btd", "btd_padded")
        and len(shape) == 3
        and shape[0] == tokens.batch
        and shape[1] == tokens.width
    )


def _first_tensor_with(values: Any) -> tuple[int, Tensor] | None:
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            return index, value
    return None


class LayerHook:
    """The persistent hook of one site; subclasses say where the hidden state is."""

    def __init__(self, session: BackboneSession, site: int, target: Target) -> None:
        self.session = session
        self.site = site
        self.target = target

    def _edited(self, hidden: Any, context: ForwardContext, inplace: bool) -> Tensor:
        target = self.target
        if (
            not isinstance(hidden, Tensor)
            or hidden.dim() < 2
            or hidden.shape[-1] != target.embed_dim
        ):
            got = (
                f"shape {tuple(hidden.shape)}"
                if isinstance(hidden, Tensor)
                else type(hidden).__name__
            )
            raise ValueError(
                f"component: the {target.side} of {target.path!r} is {got}, expected a hidden "
                f"state [..., {target.embed_dim}]; "
                "name another component, or state its width: ReftConfig(embed_dim=...)"
            )
        if torch.compiler.is_compiling():
            inplace = False  # the compiler decides itself what to reuse
        elif inplace:
            # a view may share memory that others read, and autograd forbids editing a leaf in place
            inplace = not hidden._is_view() and not (hidden.requires_grad and hidden.is_leaf)
        return context.apply(self.site, hidden, inplace, target)


class OutputHook(LayerHook):
    """Forward hook: edits the module's output, the first element of a tuple."""

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        context = self.session.current_context()
        if context is None:
            return None
        if isinstance(output, Tensor):
            # a layer that hands its input through has not made the tensor
            fresh = self.target.inplace and not (args and output is args[0])
            return self._edited(output, context, fresh)
        if isinstance(output, tuple | list) and output:
            fresh = self.target.inplace and not (args and output[0] is args[0])
            edited = self._edited(output[0], context, fresh)
            return (edited, *output[1:]) if isinstance(output, tuple) else [edited, *output[1:]]
        self._edited(output, context, False)
        return None


class InputHook(LayerHook):
    """Forward pre-hook: edits the module's first tensor argument, positional or not."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        context = self.session.current_context()
        if context is None:
            return None
        found = _first_tensor_with(args)
        if found is not None:
            index, hidden = found
            return (*args[:index], self._edited(hidden, context, False), *args[index + 1 :]), kwargs
        names = ("hidden_states", *kwargs)
        name = next((n for n in names if isinstance(kwargs.get(n), Tensor)), None)
        if name is None:
            self._edited(None, context, False)
        return args, {**kwargs, name: self._edited(kwargs[name], context, False)}
