"""The editor of one model: its adapters, its hooks, and what one forward's hooks share.

Three kinds of hook, registered once and removed with the last adapter:

    the model          takes explicit arguments and labels out of the call, which the backbone does not see
    the backbone       (what embeds tokens and runs the blocks) before: rows from the call, weights of all layers in one build;
                       after: closes the step
    each edited place  applies its edits; see :mod:`reft_kernels.model.steps`
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reft_kernels import ownership
from reft_kernels.checks import mark_rows
from reft_kernels.interventions import Intervention
from reft_kernels.model.accumulation import SharedBuild
from reft_kernels.model.components import Component, Target
from reft_kernels.model.generation import Generate
from reft_kernels.model.prompts import (
    EXPLICIT,
    Explicit,
    Generation,
    Selection,
    Window,
    argument_names,
    look,
    select,
    take_explicit,
)
from reft_kernels.model.steps import Edit, InputHook, OutputHook, Pending, Step
from reft_kernels.positions import Spec

BASE = "__base__"
Handle = torch.utils.hooks.RemovableHandle


class Adapter:
    """One adapter's places: for each width, its stack and the (index in the stack, site) of every layer in this process."""

    def __init__(self, name: str, spec: Spec, untied: bool, stacks: Mapping[int, Intervention]) -> None:
        self.name = name
        self.spec = spec
        self.untied = untied
        self.stacks = dict(stacks)
        self.places: dict[int, list[tuple[int, int]]] = {width: [] for width in stacks}
        self.pending = Pending(spec, untied, Explicit())  # kept, since a shape always gives the same rows


class _Begin:
    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        return self.scope.begin(args, kwargs)


class _End:
    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.scope.end(output)


class _Enter:
    def __init__(self, editor: Editor) -> None:
        self.editor = editor

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        self.editor.explicit = take_explicit(kwargs)
        return args, kwargs


class _Leave:
    def __init__(self, editor: Editor) -> None:
        self.editor = editor

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.editor.explicit = Explicit()


def _tensors(output: Any) -> Iterator[Tensor]:
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else (output,)
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from (v for v in value if isinstance(v, Tensor))


class Scope:
    """One backbone: the adapters that edit inside it and the step that its running forward consumes."""

    def __init__(self, editor: Editor, backbone: nn.Module, component: Component) -> None:
        self.editor = editor
        self.names = argument_names(backbone)
        self.decoder = component.decoder
        self.generates = not component.encoder  # an encoder's tokens are all prompt, and have no labels of their own
        self.sites: dict[tuple[str, str], int] = {}
        self.handles: dict[int, Handle] = {}  # of the sites' hooks
        self.ends: list[Handle] = []  # of the backbone's
        self.adapters: dict[str, Adapter] = {}
        self.step: Step | None = None
        self._last: Step | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "step": None, "_last": None}  # a step holds a graph, which neither copies nor pickles

    def begin(self, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Before the backbone: what this forward edits; None for its hooks to find where there is nothing to do."""
        self.step = self._last = None
        editor = self.editor
        changed = None
        explicit = editor.explicit if editor.generation is None else editor.generation.explicit
        if any(name in kwargs for name in EXPLICIT):  # the backbone was called directly
            explicit, changed = take_explicit(kwargs), (args, kwargs)
        adapters = editor.active_in(self)
        if adapters:
            window = look(
                {**dict(zip(self.names, args, strict=False)), **kwargs},
                explicit,
                editor.generation if self.generates else None,
                token_labels=editor.token_labels and self.generates,
                decoder=self.decoder,
            )
            self.step = self._step(adapters, window, explicit)
            if self.step is not None and self.step.has_graph and window is not None and self.generates:
                editor.mind_the_prompt(explicit, adapters)
        return changed

    def _step(self, adapters: Sequence[Adapter], window: Window | None, explicit: Explicit) -> Step | None:
        edits: dict[int, list[Edit]] = {}
        known: dict[tuple[Spec, bool], Selection | None] = {}
        shared = self.editor.shared
        if shared is not None and not shared.serves():
            shared = None
        for adapter in adapters:
            if window is None:
                said = explicit.prompt_lengths is not None or explicit.edit_positions is not None
                selection = Pending(adapter.spec, adapter.untied, explicit) if said else adapter.pending
            else:
                key = (adapter.spec, adapter.untied)
                if key not in known:
                    known[key] = select(window, *key)
                selection = known[key]
            selection = self.editor.only_members(adapter.name, selection, window)
            if selection is None:
                continue
            for width, stack in adapter.stacks.items():
                places = adapter.places[width]
                if places:
                    # a module call, so that engines which gather parameters around one do
                    weights = stack() if shared is None else shared.weights(stack)
                    device = next(stack.parameters()).device
                    for index, site in places:
                        edits.setdefault(site, []).append(Edit(stack, index, weights[index], selection, device))
        return Step(edits, torch.is_grad_enabled(), shared is not None) if edits else None

    def prune(self) -> None:
        """Remove the hooks of places that no adapter edits, and the backbone's with the last adapter."""
        used = {site for adapter in self.adapters.values() for places in adapter.places.values() for _, site in places}
        for key, site in list(self.sites.items()):
            if site not in used:
                self.handles.pop(site).remove()
                del self.sites[key]
        if not self.adapters:
            for handle in self.ends:
                handle.remove()
            self.ends.clear()

    def end(self, output: Any) -> None:
        """After the backbone: hand the step to the graph, for layers that its backward recomputes."""
        step, self.step = self.step, None
        if step is None or not step.has_graph or torch.compiler.is_compiling():
            return
        self._last = step
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(lambda grads: self._recall(step))

    def _recall(self, step: Step) -> None:
        self._last = step
        step.enter_backward()

    def recalled(self) -> Step | None:
        """The step whose layers a running backward recomputes; None outside of one."""
        if self._last is None or torch.compiler.is_compiling() or torch._C._current_graph_task_id() < 0:
            return None
        return self._last


class Editor:
    """Adapters of one model and the hooks that serve them.

    Args:
        model: the model as its users call it. token_labels: its labels ``[B, T]`` mark what follows the prompt.
    """

    def __init__(self, model: nn.Module, *, token_labels: bool) -> None:
        self.model = model
        self.token_labels = token_labels
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.explicit = Explicit()
        self.generation: Generation | None = None
        self.members: tuple[str, ...] | None = None  # the adapter of each example, in a batch of several tasks
        self.shared: SharedBuild | None = None  # one build for the forwards of an optimizer step
        self._warned = False
        self._scopes: dict[str, Scope] = {}
        self._handles: list[Handle] = []

    def __getstate__(self) -> dict:
        return {**self.__dict__, "explicit": Explicit(), "generation": None, "members": None, "shared": None}

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Every adapter by name."""
        return {name: adapter for scope in self._scopes.values() for name, adapter in scope.adapters.items()}

    def mind_the_prompt(self, explicit: Explicit, adapters: Sequence[Adapter]) -> None:
        """Say once when a model trains to continue prompts and nothing tells where they end."""
        unknown = explicit.labels is None and explicit.prompt_lengths is None and explicit.edit_positions is None
        if not unknown or self._warned or torch.compiler.is_compiling():
            return
        if self.token_labels and self.model.training and any(a.spec.kind != "all" for a in adapters):
            self._warned = True
            warnings.warn(
                "neither labels nor prompt_lengths reached the model in training, so each whole sequence counts as its prompt; "
                "pass prompt_lengths=[...] to the model (label smoothing and custom losses of a Trainer take the labels away)",
                stacklevel=2,
            )

    def active_in(self, scope: Scope) -> list[Adapter]:
        """The adapters that edit in a scope now, in order."""
        if not self.enabled:
            return []
        names = self.active if self.members is None else dict.fromkeys(self.members)
        return [scope.adapters[name] for name in names if name in scope.adapters]

    def add(self, name: str, component: Component, spec: Spec, untied: bool, stacks: Mapping[int, Intervention]) -> None:
        """Add an adapter and register the hooks that are not there yet.

        Args:
            component: the targets, in the order in which ``stacks`` (by width) hold their layers.
        """
        ownership.calibrate()  # here, since a traced forward could not
        if not self._handles:
            self._open()
        scope = self._scopes.get(component.backbone) or self._scope(component)
        adapter = Adapter(name, spec, untied, stacks)
        counts = dict.fromkeys(stacks, 0)
        for target in component.targets:
            index = counts[target.embed_dim]
            counts[target.embed_dim] += 1
            if target.present:
                adapter.places[target.embed_dim].append((index, self._site(scope, target)))
        scope.adapters[name] = adapter

    def remove(self, name: str) -> None:
        """Remove an adapter and the hooks that no other one needs."""
        self.active = tuple(n for n in self.active if n != name)
        for path, scope in list(self._scopes.items()):
            scope.adapters.pop(name, None)
            scope.prune()
            if not scope.adapters:
                del self._scopes[path]
        if not self._scopes:
            self._close()

    def _open(self) -> None:
        model = self.model
        self._handles.append(model.register_forward_pre_hook(_Enter(self), with_kwargs=True))
        self._handles.append(model.register_forward_hook(_Leave(self), always_call=True))
        if callable(getattr(type(model), "generate", None)):
            model.__dict__["generate"] = Generate(model, self, model.__dict__.get("generate"))

    def _close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        wrapper = self.model.__dict__.get("generate")
        if isinstance(wrapper, Generate) and wrapper.editor is self:
            if wrapper.replaced is None:
                del self.model.__dict__["generate"]
            else:
                self.model.__dict__["generate"] = wrapper.replaced

    def _scope(self, component: Component) -> Scope:
        backbone = self.model.get_submodule(component.backbone)
        scope = Scope(self, backbone, component)
        scope.ends.append(backbone.register_forward_pre_hook(_Begin(scope), with_kwargs=True))
        scope.ends.append(backbone.register_forward_hook(_End(scope), always_call=True))
        self._scopes[component.backbone] = scope
        return scope

    def _site(self, scope: Scope, target: Target) -> int:
        key = (target.path, target.side)
        if key not in scope.sites:
            site = scope.sites[key] = max(scope.handles, default=-1) + 1
            module = self.model.get_submodule(target.path)
            if target.side == "input":
                handle = module.register_forward_pre_hook(InputHook(scope, site, target), with_kwargs=True)
            else:  # first, so that hooks which capture hidden states see the edited one
                handle = module.register_forward_hook(OutputHook(scope, site, target), prepend=True)
            scope.handles[site] = handle
        return scope.sites[key]

    def only_members(
        self, name: str, selection: Selection | Pending | None, window: Window | None
    ) -> Selection | Pending | None:
        """A selection restricted to the examples that asked for adapter ``name``."""
        if self.members is None or selection is None:
            return selection
        if window is None or isinstance(selection, Pending) or window.packed is not None:
            raise ValueError("adapter_names: expected a padded batch of tokens, one name for each example")
        members, batch = self.members, window.batch
        if not members or batch % len(members):
            raise ValueError(f"adapter_names: got {len(members)} names for a batch of {batch}")
        mine = torch.tensor([m == name for m in members for _ in range(batch // len(members))], device=window.device)
        if selection.rows is None:
            rows = torch.arange(batch * window.width, device=window.device, dtype=torch.int32)
        else:
            rows = selection.rows
        rows = torch.where(mine.unsqueeze(1), rows.view(batch, -1), -1).flatten()
        return Selection(mark_rows(rows, batch * window.width), selection.set_ids)
