"""The editor of one model: its adapters and its hooks.

The editor intercepts three kinds of modules, from the first adapter until the last is removed:

    the model           stores the arguments of the call; the backbone may not receive labels,
                        masks and explicit arguments
    the backbone        (the module that embeds tokens and runs the blocks) before its forward,
                        computes the rows and builds the weights of all layers; afterwards, closes
                        the context
    each edited module  applies its edits; see :mod:`reft_kernels.model.forward_context`

The state of a running call is kept per thread, with a stack for nested calls; see
:mod:`reft_kernels.model.thread_state`. The active adapters are a property of the model, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reft_kernels import ownership
from reft_kernels.interventions import Intervention
from reft_kernels.model.accumulation import SharedBuild
from reft_kernels.model.backbone_session import Adapter, BackboneSession, Handle
from reft_kernels.model.components import Component, Target
from reft_kernels.model.generate_wrappers import (
    Generate,
    GenerateBatch,
    InitContinuousBatching,
    Prepare,
)
from reft_kernels.model.interception import InterceptedForward
from reft_kernels.model.layer_hooks import InputHook, OutputHook
from reft_kernels.model.members import BASE, Members
from reft_kernels.model.model_call import argument_names, take_call
from reft_kernels.model.per_thread import PerThread
from reft_kernels.model.prompt_checks import PromptChecks
from reft_kernels.model.selection import PositionRule
from reft_kernels.model.thread_state import ANNOUNCED, IN_MODEL, NEVER, NOT_QUIET, EditorState


class Editor:
    """The adapters of one model and their hooks.

    Args:
        model: the outermost model, which users call.
        token_labels: whether labels ``[B, T]`` mark the tokens after the prompt.
    """

    def __init__(self, model: nn.Module, *, token_labels: bool) -> None:
        self.model = model
        self.token_labels = token_labels
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.threads = PerThread(EditorState)
        self.checks = PromptChecks()
        self.shared: SharedBuild | None = None  # one build for the forwards of an optimizer step
        self._named: dict[str, None] = {}  # adapters that calls have named, in order
        self._sessions: dict[str, BackboneSession] = {}
        self._forward: InterceptedForward | None = None
        self._handles: list[Handle] = []
        self._generate_wrappers: list[Generate] = []
        self.names = argument_names(model)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "threads": None, "shared": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, threads=PerThread(EditorState))

    @property
    def state(self) -> EditorState:
        """State of this thread's running call."""
        return self.threads.here

    @property
    def sessions(self) -> tuple[BackboneSession, ...]:
        """The sessions of all backbones that have adapters."""
        return tuple(self._sessions.values())

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
        """Store the arguments of a call, before the model runs."""
        state = self.state
        state.outer.append((state.call, state.generation, state.quiet))
        state.quiet = NOT_QUIET
        generation = state.generation
        if generation is not None and not torch.compiler.is_compiling():
            if generation.total is not None and not generation.announced:
                # a nested call during generate, made by a hook or a logits processor
                state.generation = None
            generation.announced = False
        state.call = take_call(self.names, args, kwargs)
        if not torch.compiler.is_compiling():
            self.checks.deferred.poll()
        return args, kwargs

    def leave(self, output: Any) -> None:
        """Restore the state of the surrounding call, after the model ran."""
        state = self.state
        if state.outer:
            state.call, state.generation, state.quiet = state.outer.pop()

    def active_in(self, session: BackboneSession) -> list[Adapter]:
        """The active adapters of a session, in the order in which they edit."""
        if not self.enabled:
            return []
        members = self.state.members
        names = self.active if members is None else members.named()
        return [session.adapters[name] for name in names if name in session.adapters]

    def edits_prompts_only(self) -> bool:
        """Whether a decode step of ``generate`` edits nothing."""
        return all(
            adapter.prompts_only
            for session in self._sessions.values()
            if session.generates
            for adapter in self.active_in(session)
        )

    def edits_something(self) -> bool:
        """Whether a forward that starts now has active adapters."""
        return any(map(self.active_in, self._sessions.values()))

    def members_of(self, names: Sequence[str], device: torch.device) -> Members:
        """The adapter of each example of a call, :data:`~reft_kernels.model.members.BASE` for none.

        Args:
            names: names of adapters, one for each example.
            device: device of the model.
        """
        new = [name for name in names if name != BASE and name not in self._named]
        if new:  # replaced as a whole, for other threads
            self._named = {**self._named, **dict.fromkeys(new)}
        return Members(names, tuple(self._named), device)

    def add(
        self,
        name: str,
        component: Component,
        rule: PositionRule,
        stacks: Mapping[int, Intervention],
    ) -> None:
        """Add an adapter and register missing hooks.

        Args:
            name: name of the adapter; replaces an adapter of the same name.
            component: the targets to edit.
            rule: the positions to edit.
            stacks: for each width, the stacked intervention with the layers in the targets' order.
        """
        ownership.calibrate()  # cannot run in a traced forward
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
                adapter.prompts_only &= target.stream == "tokens"
        session.adapters[name] = adapter

    def remove(self, name: str) -> None:
        """Remove an adapter and the hooks that no other adapter needs."""
        self.active = tuple(n for n in self.active if n != name)
        self._named = {n: None for n in self._named if n != name}
        for path, session in list(self._sessions.items()):
            session.adapters.pop(name, None)
            session.prune()
            if not session.adapters:
                del self._sessions[path]
        if not self._sessions:
            self._close()

    def _open(self) -> None:
        self._forward = InterceptedForward(self.model, self, self, ANNOUNCED)

    def _watch_generate(self, module: nn.Module) -> None:
        """Wrap ``generate`` and ``prepare_inputs_for_generation`` of a module that has them."""
        if any(wrapper.model is module for wrapper in self._generate_wrappers):
            return
        for kind in (Generate, Prepare, GenerateBatch, InitContinuousBatching):
            if callable(getattr(type(module), kind.name, None)):
                wrapper = kind(module, self, module.__dict__.get(kind.name))
                module.__dict__[kind.name] = wrapper
                self._generate_wrappers.append(wrapper)

    def _close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._forward is not None:
            self._forward.remove()
            self._forward = None
        for wrapper in self._generate_wrappers:
            attributes = wrapper.model.__dict__
            if attributes.get(wrapper.name) is wrapper:
                if wrapper.replaced is None:
                    del attributes[wrapper.name]
                else:
                    attributes[wrapper.name] = wrapper.replaced
        self._generate_wrappers.clear()

    def _session(self, component: Component) -> BackboneSession:
        backbone = self.model.get_submodule(component.backbone)
        session = self._sessions[component.backbone] = BackboneSession(self, backbone, component)
        self._watch(session, component.backbone)
        return session

    def _watch(self, session: BackboneSession, path: str) -> None:
        """Intercept a session's backbone, and ``generate`` of every module that contains it."""
        parts = path.split(".") if path else []
        ancestors = [
            self.model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)
        ]
        for module in ancestors:
            self._watch_generate(module)
        # the innermost module that maps audio samples to frames
        maps = [
            m for m in ancestors if callable(getattr(m, "_get_feature_vector_attention_mask", None))
        ]
        if maps:
            session.frame_mask = _FrameMask(maps[-1])
        session.drops_layers = _may_skip_layers(getattr(self.model, "config", None))
        quiet_from = IN_MODEL if session.generates else NEVER
        session.forward = InterceptedForward(ancestors[-1], session, self, quiet_from)

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
            else:  # prepended, so that hooks that capture hidden states see the edited one
                handle = module.register_forward_hook(
                    OutputHook(session, site, target), prepend=True
                )
            session.handles[site] = handle
        return session.sites[key]


def _may_skip_layers(config: Any) -> bool:
    """Whether forwards may skip layers: at random, or cross-attention layers without an image."""
    text = getattr(config, "text_config", None)
    names = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
    at_random = any((getattr(config, name, 0.0) or 0.0) > 0 for name in names)
    return at_random or any(
        bool(getattr(part, "cross_attention_layers", None)) for part in (config, text)
    )


class _FrameMask:
    """Maps the mask of an audio input to its frames, with the model's own method.

    An object rather than a closure, so that a copied model refers to the copy.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def __call__(self, frames: int, mask: Tensor) -> Tensor:
        """Mask of the frames, ``[B, frames]``, from the mask ``[B, S]`` of the samples."""
        return self.module._get_feature_vector_attention_mask(frames, mask)
