"""Runs the adapters of one backbone: builds the forward context and handles recomputation."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from reft_kernels.interventions import RED, Intervention
from reft_kernels.interventions.banks import LayerWeights
from reft_kernels.model.accumulation import SharedBuild
from reft_kernels.model.cached_edits import (
    CachedEdit,
    record_edits,
    starts_from_cache,
    warn_if_edited_otherwise,
)
from reft_kernels.model.caches import cache_of, is_paged
from reft_kernels.model.components import Component, Target
from reft_kernels.model.forward_context import Edit, ForwardContext
from reft_kernels.model.generate_wrappers import NO_CONTINUOUS_BATCHING
from reft_kernels.model.interception import InterceptedForward
from reft_kernels.model.member_groups import (
    KeptGroups,
    WeightsOf,
    check_members,
    group_members,
    member_edits,
)
from reft_kernels.model.members import Members, unsupported_batch
from reft_kernels.model.model_call import ModelCall, argument_names, take_call
from reft_kernels.model.per_thread import PerThread
from reft_kernels.model.prompt_checks import Mode, PromptChecks
from reft_kernels.model.prompts import compute_prompt_window
from reft_kernels.model.scaled_selection import check_scaling, scaled_selection
from reft_kernels.model.scaling import Scaling
from reft_kernels.model.selection import (
    DeferredSelection,
    PositionRule,
    Selection,
    TokenShape,
    select,
)
from reft_kernels.model.thread_state import NOT_QUIET, EditorState, Frame, SessionState
from reft_kernels.model.window import Window

Handle = torch.utils.hooks.RemovableHandle


class ModelEditor(Protocol):
    """The interface of the editor that a session uses."""

    model: nn.Module
    token_labels: bool
    threads: PerThread[EditorState]

    @property
    def state(self) -> EditorState: ...

    checks: PromptChecks
    shared: SharedBuild | None

    def active_in(self, session: BackboneSession) -> list[Adapter]:
        """The active adapters of a session, in the order in which they edit."""


class Adapter:
    """One adapter's stacks and the sites that they edit.

    Attributes:
        name: name of the adapter.
        rule: the positions that it edits.
        stacks: the stacked intervention of each width.
        places: for each width, (index in the stack, site) of every layer in this process.
        rank: its rank; None for RED.
        prompts_only: whether only tokens of prompts are edited.
    """

    def __init__(self, name: str, rule: PositionRule, stacks: Mapping[int, Intervention]) -> None:
        self.name = name
        self.rule = rule
        self.stacks = dict(stacks)
        self.places: dict[int, list[tuple[int, int]]] = {width: [] for width in stacks}
        first = next(iter(stacks.values()))
        self.rank = None if isinstance(first, RED) else first.rank
        self.num_sets = first.num_sets or 1
        self.prompts_only = rule.spec.kind != "all"

    def trains(self) -> bool:
        """Whether any parameter requires gradients."""
        return any(p.requires_grad for stack in self.stacks.values() for p in stack.parameters())

    def scaled(self, scaling: Scaling, selection: Selection, window: Window) -> Selection:
        """A selection with the coefficients of a call."""
        return scaled_selection(selection, window, scaling, self.rank, self.num_sets)


def _tensors(output: Any) -> Iterator[Tensor]:
    values = (
        output.values()
        if isinstance(output, Mapping)
        else output
        if isinstance(output, tuple | list)
        else (output,)
    )
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from (v for v in value if isinstance(v, Tensor))


class _NoStep:
    """Marks a forward without edits, whose backward may recompute layers."""


_NO_CONTEXT = _NoStep()


class BackboneSession:
    """The adapters of one backbone, and the context of its running forward.

    Args:
        editor: the editor of the model.
        backbone: the module whose call receives the tokens.
        component: a component of this backbone; sets its role in an encoder-decoder model.
    """

    def __init__(self, editor: ModelEditor, backbone: nn.Module, component: Component) -> None:
        self.editor = editor
        self.backbone = backbone
        self.names = argument_names(backbone)
        self.decoder = component.decoder
        # an encoder's tokens all belong to the prompt, and labels do not align with them
        self.generates = not component.encoder
        self.targets: dict[int, Target] = {}
        self.sites: dict[tuple[str, str], int] = {}
        self.handles: dict[int, Handle] = {}  # hook of each site
        self.forward: InterceptedForward | None = None  # wrapper of the backbone's forward
        self.adapters: dict[str, Adapter] = {}
        self.frame_mask: Any = None  # (frames, audio mask) -> bool [B, frames]
        self.drops_layers = False  # some forwards skip layers
        self.groups = KeptGroups()  # of adapters that share a batch
        self.threads = PerThread(SessionState)
        # contexts of forwards whose graph is alive
        self.live: weakref.WeakSet[ForwardContext] = weakref.WeakSet()
        # keeps the latest context alive until the next forward, even without the output
        self.last: ForwardContext | None = None
        self._recomputed: dict[int, Any] = {}  # graph task -> weak reference to its context

    def __getstate__(self) -> dict:
        # a context holds an autograd graph, which cannot be copied or pickled
        dropped: dict[str, Any] = {
            "threads": None,
            "live": None,
            "last": None,
            "_recomputed": {},
            "groups": None,
        }
        return {**self.__dict__, **dropped}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, threads=PerThread(SessionState), live=weakref.WeakSet())
        self.groups = KeptGroups()

    @property
    def state(self) -> SessionState:
        """State of this thread's running call."""
        return self.threads.here

    # ---- around the backbone

    def enter(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Create the context of a forward, before the backbone runs."""
        # before anything can raise, because leave() always follows
        editor = self.editor
        frame = self.state.frame = Frame(self.state.frame, editor.state.quiet)
        editor.state.quiet = NOT_QUIET
        self.last = None
        generation, call = editor.state.generation, editor.state.call
        if call is None:  # the backbone was called directly, not through the model
            call = take_call(self.names, args, kwargs)
        if generation is not None:
            call = call.with_explicit(generation.call)
            if not self.generates:
                generation = None
        adapters = editor.active_in(self)
        if adapters:
            arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
            if is_paged(arguments):
                raise ValueError(f"cache: {NO_CONTINUOUS_BATCHING}")
            window = compute_prompt_window(
                arguments,
                call,
                generation,
                token_labels=editor.token_labels and self.generates,
                decoder=self.decoder,
            )
            frame.context = self._step(adapters, window, call, arguments)
        return args, kwargs

    def leave(self, output: Any) -> None:
        """Close the context of a forward, after the backbone ran.

        Registers hooks on the output's autograd nodes, so that layers which the backward
        recomputes get the same context.
        """
        frame = self.state.frame
        if frame is None:
            return
        self.state.frame, context = frame.outer, frame.context
        self.editor.state.quiet = frame.quiet
        if output is None or torch.compiler.is_compiling():
            return
        if context is not None and context.records:
            cache = context.cache if context.cache is not None else _returned_cache(output)
            record_edits(cache, context.records)
        if context is not None:
            self._refuse_idle_sites(context)
        if not torch.is_grad_enabled():
            return
        if context is not None:
            self.live.add(context)
            self.last = context
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(lambda grads: self._recall(context))

    def _refuse_idle_sites(self, context: ForwardContext) -> None:
        """Raise in training if an edited module did not run: it would get no gradient."""
        if not (context.training and context.has_graph) or self.drops_layers:
            return
        idle = [self.targets[site].path for site in context.edits if site not in context.ran]
        if idle:
            raise ValueError(
                f"component: {', '.join(idle[:4])}{', ...' if len(idle) > 4 else ''} did not run "
                "in this forward, so nothing would be trained there; name a component that the "
                "model calls, or leave these layers out of layers=[...]"
            )

    # ---- recomputation

    def _recall(self, context: ForwardContext | None) -> None:
        task = torch._C._current_graph_task_id()
        self._recomputed[task] = _NO_CONTEXT if context is None else weakref.ref(context)
        torch.autograd.Variable._execution_engine.queue_callback(
            lambda: self._recomputed.pop(task, None)
        )
        if context is not None:
            context.enter_backward()

    def recomputed_context(self) -> ForwardContext | None:
        """The context of the forward whose layers the running backward recomputes.

        Raises:
            RuntimeError: several forwards have a live graph, and the backward did not pass
                through the output of any of them.
        """
        if torch.compiler.is_compiling() or not (self.live or self._recomputed):
            return None
        task = torch._C._current_graph_task_id()
        if task < 0:
            return None
        recalled = self._recomputed.get(task)
        if recalled is not None:
            return None if recalled is _NO_CONTEXT else recalled()
        live = list(self.live)
        if len(live) > 1:
            raise RuntimeError(
                "gradient checkpointing: several forwards wait for their backward, and this "
                "backward did not come through the model's output, so it is unknown which "
                "forward's layers it recomputes; compute the loss from the output"
            )
        return live[0] if live else None

    # ---- the context

    def _step(
        self,
        adapters: Sequence[Adapter],
        window: Window | None,
        call: ModelCall,
        arguments: Mapping[str, Any],
    ) -> ForwardContext | None:
        edits: dict[int, list[Edit]] = {}
        selections: dict[PositionRule, Selection | None] = {}
        editor = self.editor
        shared = editor.shared
        if shared is not None and not shared.serves():
            shared = None
        context = ForwardContext(edits, torch.is_grad_enabled(), shared is not None)
        cache = context.cache = None if window is None else cache_of(arguments)
        continued = starts_from_cache(window, cache)
        members = editor.state.members
        if members is not None:
            self._check_members(members, adapters, window)
        checked: dict[tuple[PositionRule, Mode], list[str]] = {}
        weights_of = _build if shared is None else shared.weights
        for adapter in adapters:
            scaled = None
            if call.scaling is not None:
                own = self._paths(adapter, "own")
                check_scaling(call.scaling, adapter.name, adapter.rank, window, members, own)
                scaled = partial(adapter.scaled, call.scaling)
            deferred = DeferredSelection(adapter.rule, call, self.frame_mask, scaled)
            selection: Selection | DeferredSelection | None = deferred
            tokens = None
            training = editor.model.training and torch.is_grad_enabled() and adapter.trains()
            context.training |= training
            if window is not None:
                tokens = TokenShape(window.batch, window.width)
                if adapter.rule not in selections:
                    selections[adapter.rule] = select(window, adapter.rule)
                selection = token_selection = selections[adapter.rule]
                if self._on_tokens(adapter):
                    mode = Mode(training, editor.token_labels and self.generates)
                    if members is None:
                        editor.checks.check(window, adapter.rule, token_selection, mode)
                    else:
                        checked.setdefault((adapter.rule, mode), []).append(adapter.name)
                    if continued:
                        mask = None if members is None else members.mask(adapter.name, window)
                        warn_if_edited_otherwise(cache, adapter.name, adapter.rule, window, mask)
                    self._record(context, adapter, window, token_selection)
            if members is not None:
                continue
            if scaled is not None and window is not None and isinstance(selection, Selection):
                selection = scaled(selection, window)
            for width, stack in adapter.stacks.items():
                places = [
                    (index, site, self.targets[site].stream)
                    for index, site in adapter.places[width]
                ]
                if selection is None:
                    places = [place for place in places if place[2] == "own"]
                if not places:
                    continue
                weights = weights_of(stack)
                device = next(stack.parameters()).device
                for index, site, stream in places:
                    if stream == "own" or selection is None:
                        edit = Edit(stack, index, weights[index], deferred, None, device)
                    else:
                        edit = Edit(stack, index, weights[index], selection, tokens, device)
                    edits.setdefault(site, []).append(edit)
        if members is not None and window is not None:
            for (rule, mode), names in checked.items():
                check_members(editor.checks, members, names, rule, window, mode)
            edits.update(self._member_edits(members, window, selections, weights_of))
        if context.training and getattr(editor.model, "_require_grads_hook", None) is not None:
            context.untrained_below = lambda: self._untrained_below(arguments)
        return context if edits else None

    def _member_edits(
        self,
        members: Members,
        window: Window,
        selections: Mapping[PositionRule, Selection | None],
        weights_of: WeightsOf,
    ) -> dict[int, list[Edit]]:
        """The edits of a batch with the adapter of each example."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            built: dict[Intervention, LayerWeights] = {}

            def built_once(stack: Intervention) -> LayerWeights:
                if stack not in built:
                    built[stack] = weights_of(stack)
                return built[stack]

            groups = group_members(self.adapters, members.named(), built_once)
            return member_edits(groups, built_once, members, window, selections)
        groups, kept = self.groups.groups(self.adapters, members)
        return member_edits(groups, kept, members, window, selections)

    def _check_members(
        self, members: Members, adapters: Sequence[Adapter], window: Window | None
    ) -> None:
        """Raise unless each row of each edited module belongs to a known example."""
        if window is None:
            raise unsupported_batch()
        members.numbers(window)  # raises for a packed batch, and for another number of names
        for adapter in adapters:
            for path in self._paths(adapter, "own"):
                raise ValueError(
                    f"adapter_names: adapter {adapter.name!r} edits {path}, whose rows are not "
                    "tokens, expected adapters that edit tokens; use set_adapter"
                )

    def _untrained_below(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the embeddings of a call require gradients for gradient checkpointing only.

        True if transformers' ``enable_input_require_grads`` was called, no argument has a graph and
        the backbone trains nothing but edits.
        """
        if arguments.get("past_key_values") is not None:
            return False
        if any(tensor.requires_grad for tensor in _tensors(arguments)):
            return False
        return trained_besides_edits(self.backbone) is None

    def _on_tokens(self, adapter: Adapter) -> bool:
        return bool(self._paths(adapter, "tokens"))

    def _paths(self, adapter: Adapter, stream: str) -> list[str]:
        """The modules with rows of one stream that an adapter edits."""
        targets = (self.targets[s] for places in adapter.places.values() for _, s in places)
        return [target.path for target in targets if target.stream == stream]

    def _record(
        self, context: ForwardContext, adapter: Adapter, window: Window, selection: Selection | None
    ) -> None:
        """Record the columns that this forward edits and adds to the cache."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and context.cache is None):
            return
        if selection is not None and window.packed is None and isinstance(window.offset, int):
            members = self.editor.state.members
            edit = CachedEdit(
                adapter.name,
                window.offset,
                window.batch,
                window.width,
                selection.rows,
                None if members is None else members.mask(adapter.name, window),
            )
            context.records.append(edit)

    def prune(self) -> None:
        """Remove the hooks of sites without an adapter; without adapters, the backbone's too."""
        used = {
            site
            for adapter in self.adapters.values()
            for places in adapter.places.values()
            for _, site in places
        }
        for key, site in list(self.sites.items()):
            if site not in used:
                self.handles.pop(site).remove()
                del self.sites[key], self.targets[site]
        if not self.adapters and self.forward is not None:
            self.forward.remove()
            self.forward = None


def trained_besides_edits(backbone: nn.Module) -> str | None:
    """Name of a parameter that requires gradients and belongs to no intervention, or None."""
    for path, module in backbone.named_modules():
        if not isinstance(module, Intervention):
            for name, p in module._parameters.items():
                if p is not None and p.requires_grad:
                    return f"{path}.{name}".lstrip(".")
    return None


def _build(stack: Intervention) -> LayerWeights:
    return stack()  # not build(), so that FSDP gathers the parameters


def _returned_cache(output: Any) -> Any:
    return cache_of(output if isinstance(output, Mapping) else {})
