"""The editor of one model: its adapters, its hooks, and what one forward's hooks share.

Three kinds of interception, made once and removed with the last adapter:

    the model          takes explicit arguments, labels and masks out of the call, which the
                       backbone may not see
    the backbone       (what embeds tokens and runs the blocks) before: rows from the call, weights
                       of all layers in one build;
                       after: closes the context
    each edited place  applies its edits; see :mod:`reft_kernels.model.forward_context`

What belongs to a running call is kept for each thread, and as a stack for nested calls: see
:mod:`reft_kernels.model.model_call`. Which adapters are active is the model's, as PEFT has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reft_kernels import ownership
from reft_kernels.checks import mark_rows
from reft_kernels.interventions import Intervention
from reft_kernels.model.accumulation import SharedBuild
from reft_kernels.model.backbone_session import Adapter, BackboneSession, Handle
from reft_kernels.model.components import Component, Target
from reft_kernels.model.generate_wrappers import Generate, Prepare
from reft_kernels.model.interception import InterceptedForward
from reft_kernels.model.layer_hooks import InputHook, OutputHook
from reft_kernels.model.model_call import argument_names, take_call
from reft_kernels.model.prompt_checks import PromptChecks
from reft_kernels.model.selection import DeferredSelection, PositionRule, Selection
from reft_kernels.model.thread_state import EditorState
from reft_kernels.model.window import Window

BASE = "__base__"


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
