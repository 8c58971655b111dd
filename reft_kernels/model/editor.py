"""The editor of one model: its adapters, its hooks, and what one forward's hooks share.

Three kinds of interception, made once and removed with the last adapter:

    the model          takes explicit arguments, labels and masks out of the call, which the
                       backbone may not see
    the backbone       (what embeds tokens and runs the blocks) before: rows from the call, weights
                       of all layers in one build;
                       after: closes the context
    each edited place  applies its edits; see :mod:`reft_kernels.model.forward_context`

What belongs to a running call is kept for each thread, and as a stack for nested calls: see
:mod:`reft_kernels.model.call_state`. Which adapters are active is the model's, as PEFT has it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reft_kernels import ownership
from reft_kernels.checks import mark_rows
from reft_kernels.interventions import Intervention
from reft_kernels.model.accumulation import SharedBuild
from reft_kernels.model.caches import CachedEdit, cache_of, edited_columns, record_edits
from reft_kernels.model.call_state import EditorState, Frame, ModelCall, SessionState, take_call
from reft_kernels.model.components import Component, Target
from reft_kernels.model.forward_context import Edit, ForwardContext, InputHook, OutputHook
from reft_kernels.model.generation import Generate, Prepare
from reft_kernels.model.interception import InterceptedForward
from reft_kernels.model.prompt_checks import Mode, PromptChecks
from reft_kernels.model.prompts import Window, argument_names, compute_prompt_window
from reft_kernels.model.selection import (
    DeferredSelection,
    PositionRule,
    Selection,
    TokenShape,
    select,
)

BASE = "__base__"
Handle = torch.utils.hooks.RemovableHandle

_STALE_CACHE = (
    "ReFT: past_key_values holds {past} columns whose edits by adapter {name!r} are not those of "
    "this prompt "
    "(columns {columns} of example {example} differ), so the output differs from generating "
    "without the cache. Fill the "
    "cache with prompt_lengths=[...] of the whole prompt, or generate without it"
)


class Adapter:
    """One adapter's places: for each width, its stack and the (index in the stack, site) of
    every layer in this process.
    """

    def __init__(self, name: str, rule: PositionRule, stacks: Mapping[int, Intervention]) -> None:
        self.name = name
        self.rule = rule
        self.stacks = dict(stacks)
        self.places: dict[int, list[tuple[int, int]]] = {width: [] for width in stacks}

    def trains(self) -> bool:
        """Whether a parameter of it requires gradients."""
        return any(p.requires_grad for stack in self.stacks.values() for p in stack.parameters())


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
    """Stands for a forward that edited nothing, among those whose backward may recompute layers."""


_NO_CONTEXT = _NoStep()


class BackboneSession:
    """One backbone: the adapters that edit inside it and the context that its running forward
    consumes.
    """

    def __init__(self, editor: Editor, backbone: nn.Module, component: Component) -> None:
        self.editor = editor
        self.names = argument_names(backbone)
        self.decoder = component.decoder
        self.generates = (
            not component.encoder
        )  # an encoder's tokens are all prompt, and have no labels of their own
        self.targets: dict[int, Target] = {}
        self.sites: dict[tuple[str, str], int] = {}
        self.handles: dict[int, Handle] = {}  # of the sites' hooks
        self.forward: InterceptedForward | None = None  # of the backbone
        self.adapters: dict[str, Adapter] = {}
        self.frame_mask: Any = None  # (frames, audio mask) -> bool [B, frames]
        self.drops_layers = False  # some forwards leave layers out
        self.state = SessionState()
        self.live: weakref.WeakSet[ForwardContext] = (
            weakref.WeakSet()
        )  # whose graphs wait for a backward
        self.last: ForwardContext | None = (
            None  # kept until the next forward, whatever becomes of the model's output
        )
        self._recomputed: dict[int, Any] = {}

    def __getstate__(self) -> dict:
        # a context holds a graph, which neither copies nor pickles
        return {**self.__dict__, "state": None, "live": None, "last": None, "_recomputed": {}}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, state=SessionState(), live=weakref.WeakSet())

    # ---- around the backbone

    def enter(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the backbone: what this forward edits."""
        frame = self.state.frame = Frame(
            self.state.frame
        )  # first, since leave() follows whatever happens here
        self.last = None
        editor = self.editor
        generation, call = editor.state.generation, editor.state.call
        if call is None:  # the backbone was called past the model
            call = take_call(self.names, args, kwargs)
        if generation is not None:
            said = generation.call
            call = call._replace(
                prompt_lengths=said.prompt_lengths, edit_positions=said.edit_positions
            )
            if not self.generates:
                generation = None
        adapters = editor.active_in(self)
        if adapters:
            arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
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
        """After the backbone: hand the context to the graph, for layers that its backward
        recomputes.
        """
        frame = self.state.frame
        if frame is None:
            return
        self.state.frame, context = frame.outer, frame.context
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
        """In training, a place that its model did not run is one that would not be trained."""
        if not (context.training and context.has_graph) or self.drops_layers:
            return
        idle = [self.targets[site].path for site in context.edits if site not in context.ran]
        if idle:
            raise ValueError(
                f"component: {', '.join(idle[:4])}{', ...' if len(idle) > 4 else ''} did not run "
                "in this forward, so nothing "
                "would be trained there; name a component that the model calls, or leave these "
                "layers out of layers=[...]"
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

    def current_context(self) -> ForwardContext | None:
        """The context that a layer's hook consumes: the running forward's, or that of the
        forward that a backward recomputes.
        """
        frame = self.state.frame
        if frame is not None:
            return frame.context
        if torch.compiler.is_compiling() or not (self.live or self._recomputed):
            return None
        task = torch._C._current_graph_task_id()
        if task < 0:
            return None
        known = self._recomputed.get(task)
        if known is not None:
            return None if known is _NO_CONTEXT else known()
        live = list(self.live)
        if len(live) > 1:
            raise RuntimeError(
                "gradient checkpointing: several forwards wait for their backward, and this one "
                "did not come through the "
                "model's output, so it cannot be told which forward's layers it recomputes; "
                "compute the loss from the output"
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
        known: dict[PositionRule, Selection | None] = {}
        editor = self.editor
        shared = editor.shared
        if shared is not None and not shared.serves():
            shared = None
        context = ForwardContext(edits, torch.is_grad_enabled(), shared is not None)
        cache = context.cache = None if window is None else cache_of(arguments)
        continued = self._starts_from_cache(window, cache)
        for adapter in adapters:
            own = DeferredSelection(adapter.rule, call, self.frame_mask)
            selection: Selection | DeferredSelection | None = own
            tokens = None
            if window is not None:
                tokens = TokenShape(window.batch, window.width)
                if adapter.rule not in known:
                    known[adapter.rule] = select(window, adapter.rule)
                selection = known[adapter.rule]
            training = editor.model.training and torch.is_grad_enabled() and adapter.trains()
            context.training |= training
            if window is not None and self._on_tokens(adapter):
                editor.checks.check(
                    window,
                    adapter.rule,
                    selection,
                    Mode(training, editor.token_labels and self.generates),
                )
                if continued:
                    self._compare_cache(adapter, window, cache)
                self._record(context, adapter, window, selection)
            selection = editor.restrict_to_members(adapter.name, selection, window)
            for width, stack in adapter.stacks.items():
                places = [
                    (index, site, self.targets[site].stream)
                    for index, site in adapter.places[width]
                ]
                if selection is None:
                    places = [place for place in places if place[2] == "own"]
                if not places:
                    continue
                # a module call, so that engines which gather parameters around one do
                weights = stack() if shared is None else shared.weights(stack)
                device = next(stack.parameters()).device
                for index, site, stream in places:
                    what = (own, None) if stream == "own" else (selection, tokens)
                    edits.setdefault(site, []).append(
                        Edit(stack, index, weights[index], *what, device)
                    )
        return context if edits else None

    def _on_tokens(self, adapter: Adapter) -> bool:
        return any(
            self.targets[site].stream == "tokens"
            for places in adapter.places.values()
            for _, site in places
        )

    # ---- what a cache holds

    @staticmethod
    def _starts_from_cache(window: Window | None, cache: Any) -> bool:
        """Whether this is the first call of a generation that goes on from a filled cache."""
        if (
            window is None
            or window.generation is None
            or not window.generation.is_first
            or torch.compiler.is_compiling()
        ):
            return False
        window.generation.is_first = False
        return cache is not None and isinstance(window.offset, int) and window.offset > 0

    @staticmethod
    def _record(
        context: ForwardContext, adapter: Adapter, window: Window, selection: Selection | None
    ) -> None:
        """What this forward edits of what it puts into a cache."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and context.cache is None):
            return
        if selection is not None and window.packed is None and isinstance(window.offset, int):
            edit = CachedEdit(
                adapter.name, window.offset, window.batch, window.width, selection.rows
            )
            context.records.append(edit)

    def _compare_cache(self, adapter: Adapter, window: Window, cache: Any) -> None:
        past = window.offset
        held = edited_columns(cache, adapter.name, window.batch, past, window.device)
        if window.lengths is None or held is None:
            return
        whole = Window(
            window.batch,
            past,
            window.device,
            0,
            window.total,
            False,
            window.starts,
            window.lengths,
            window.source,
            tokens=None if window.whole is None else window.whole[:, :past],
            whole=window.whole,
            text=window.text,
            call=window.call,
            generation=window.generation,
        )
        wanted = select(whole, adapter.rule)
        rows = None if wanted is None else wanted.rows
        asked = (
            CachedEdit(adapter.name, 0, window.batch, past, rows).columns(past).to(window.device)
        )
        differ = (asked & (window.whole[:, :past] if window.whole is not None else True)) != held
        if bool(differ.any()):
            example = int(differ.any(dim=1).to(torch.int8).argmax())
            columns = differ[example].nonzero().flatten().tolist()
            text = ", ".join(map(str, columns[:8])) + (", ..." if len(columns) > 8 else "")
            warnings.warn(
                _STALE_CACHE.format(past=past, name=adapter.name, columns=text, example=example),
                stacklevel=2,
            )

    def prune(self) -> None:
        """Remove the hooks of places that no adapter edits, and the backbone's with the last
        adapter.
        """
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


def _returned_cache(output: Any) -> Any:
    values = output if isinstance(output, Mapping) else {}
    return cache_of(values)


class Editor:
    """Adapters of one model and the hooks that serve them.

    Args:
        model: the model as its users call it. token_labels: its labels ``[B, T]`` mark what follows
            the prompt.
    """

    def __init__(self, model: nn.Module, *, token_labels: bool) -> None:
        self.model = model
        self.token_labels = token_labels
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.state = EditorState()
        self.checks = PromptChecks()
        self.shared: SharedBuild | None = None  # one build for the forwards of an optimizer step
        self._sessions: dict[str, BackboneSession] = {}
        self._forward: InterceptedForward | None = None
        self._handles: list[Handle] = []
        self._stand_ins: list[Generate] = []
        self.names = argument_names(model)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "state": None, "shared": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, state=EditorState())

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Every adapter by name."""
        return {
            name: adapter
            for session in self._sessions.values()
            for name, adapter in session.adapters.items()
        }

    # ---- around the model

    def enter(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the model: note what the user passed."""
        state = self.state
        state.outer.append((state.call, state.generation))
        generation = state.generation
        if generation is not None and not torch.compiler.is_compiling():
            if generation.total is not None and not generation.announced:
                state.generation = (
                    None  # a call of the model while it generates, by a hook or a logits processor
                )
            generation.announced = False
        state.call = take_call(self.names, args, kwargs)
        if not torch.compiler.is_compiling():
            self.checks.deferred.poll()
        return args, kwargs

    def leave(self, output: Any) -> None:
        """After the model."""
        state = self.state
        if state.outer:
            state.call, state.generation = state.outer.pop()

    def active_in(self, session: BackboneSession) -> list[Adapter]:
        """The adapters that edit in a session now, in order."""
        if not self.enabled:
            return []
        members = self.state.members
        names = self.active if members is None else dict.fromkeys(members)
        return [session.adapters[name] for name in names if name in session.adapters]

    def add(
        self,
        name: str,
        component: Component,
        rule: PositionRule,
        stacks: Mapping[int, Intervention],
    ) -> None:
        """Add an adapter and register the hooks that are not there yet.

        Args:
            component: the targets, in the order in which ``stacks`` (by width) hold their layers.
        """
        ownership.calibrate()  # here, since a traced forward could not
        if self._forward is None:
            self._open()
        session = self._sessions.get(component.backbone) or self._session(component)
        adapter = Adapter(name, rule, stacks)
        counts = dict.fromkeys(stacks, 0)
        for target in component.targets:
            index = counts[target.embed_dim]
            counts[target.embed_dim] += 1
            if target.present:
                adapter.places[target.embed_dim].append((index, self._site(session, target)))
        session.adapters[name] = adapter

    def remove(self, name: str) -> None:
        """Remove an adapter and the hooks that no other one needs."""
        self.active = tuple(n for n in self.active if n != name)
        for path, session in list(self._sessions.items()):
            session.adapters.pop(name, None)
            session.prune()
            if not session.adapters:
                del self._sessions[path]
        if not self._sessions:
            self._close()

    def _open(self) -> None:
        self._forward = InterceptedForward(self.model, self)

    def _watch_generate(self, module: nn.Module) -> None:
        """Let the hooks know of a module's ``generate``."""
        if any(stand_in.model is module for stand_in in self._stand_ins):
            return
        for kind in (Generate, Prepare):
            if callable(getattr(type(module), kind.name, None)):
                stand_in = kind(module, self, module.__dict__.get(kind.name))
                module.__dict__[kind.name] = stand_in
                self._stand_ins.append(stand_in)

    def _close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._forward is not None:
            self._forward.remove()
            self._forward = None
        for stand_in in self._stand_ins:
            attributes = stand_in.model.__dict__
            if attributes.get(stand_in.name) is stand_in:
                if stand_in.replaced is None:
                    del attributes[stand_in.name]
                else:
                    attributes[stand_in.name] = stand_in.replaced
        self._stand_ins.clear()

    def _session(self, component: Component) -> BackboneSession:
        backbone = self.model.get_submodule(component.backbone)
        session = self._sessions[component.backbone] = BackboneSession(self, backbone, component)
        self._watch(session, component.backbone)
        return session

    def _watch(self, session: BackboneSession, path: str) -> None:
        """Intercept a session's backbone, and ``generate`` of what surrounds it."""
        parts = path.split(".") if path else []
        around = [
            self.model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)
        ]
        for module in around:
            self._watch_generate(module)
        # the innermost that maps samples to frames
        maps = [
            m for m in around if callable(getattr(m, "_get_feature_vector_attention_mask", None))
        ]
        if maps:
            session.frame_mask = _FrameMask(maps[-1])
        session.drops_layers = _may_leave_layers_out(getattr(self.model, "config", None))
        session.forward = InterceptedForward(around[-1], session)

    def _site(self, session: BackboneSession, target: Target) -> int:
        key = (target.path, target.side)
        if key not in session.sites:
            site = session.sites[key] = max(session.handles, default=-1) + 1
            session.targets[site] = target
            module = self.model.get_submodule(target.path)
            if target.side == "input":
                handle = module.register_forward_pre_hook(
                    InputHook(session, site, target), with_kwargs=True
                )
            else:  # first, so that hooks which capture hidden states see the edited one
                handle = module.register_forward_hook(
                    OutputHook(session, site, target), prepend=True
                )
            session.handles[site] = handle
        return session.sites[key]

    def restrict_to_members(
        self, name: str, selection: Selection | DeferredSelection | None, window: Window | None
    ) -> Selection | DeferredSelection | None:
        """A selection restricted to the examples that asked for adapter ``name``."""
        members = self.state.members
        if members is None or selection is None:
            return selection
        if window is None or isinstance(selection, DeferredSelection) or window.packed is not None:
            raise ValueError(
                "adapter_names: expected a padded batch of tokens, one name for each example"
            )
        batch = window.batch
        if not members or batch % len(members):
            raise ValueError(f"adapter_names: got {len(members)} names for a batch of {batch}")
        mine = torch.tensor(
            [m == name for m in members for _ in range(batch // len(members))], device=window.device
        )
        if selection.rows is None:
            rows = torch.arange(batch * window.width, device=window.device, dtype=torch.int32)
        else:
            rows = selection.rows
        rows = torch.where(mine.unsqueeze(1), rows.view(batch, -1), -1).flatten()
        return Selection(mark_rows(rows, batch * window.width), selection.weight_ids)


def _may_leave_layers_out(config: Any) -> bool:
    """Whether a model runs some of its layers in some batches only: at random, or where there is
    an image.
    """
    text = getattr(config, "text_config", None)
    names = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
    at_random = any((getattr(config, name, 0.0) or 0.0) > 0 for name in names)
    return at_random or any(
        bool(getattr(part, "cross_attention_layers", None)) for part in (config, text)
    )


class _FrameMask:
    """A model's own map from an audio input's mask to its frames. An object, so that a copied
    model's is the copy's.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, frames: int, mask: Tensor) -> Tensor:
        return self.module._get_feature_vector_attention_mask(frames, mask)
