"""``accelerate_adapters``, which runs the ReFT edits of ``adapters`` with fused kernels.

AdapterHub's ``adapters`` still manages configurations, modules, parameters, active adapters, saving
and loading. The edits of its layers are

    h + R^T (act(W h + b) - R h)   LoReFT, and NoReFT with unconstrained R
    h + R^T act(W h + b)           DiReFT

followed by dropout on the edited rows. They are computed by this package: R of all layers in one
call, and the edit of a layer in one launch, in place.

As in the paper, the prompt is edited: the first ``prefix_positions`` and the last
``suffix_positions`` of its real tokens, with padding on either side. Decoding steps are not edited,
because the cache contains the edited prompt. The prompt is determined by the first of these that
applies:

1. ``prompt_lengths=[...]``, passed to the model.
2. The input of ``generate``.
3. With ``prompts="labels"``, the tokens before the first label other than -100.
4. The whole sequence of the call, as in ``adapters``.

A token that is among both the first and the last is edited once, as one of the last. With
transformers 4.57, the Llama and Mistral classes of ``adapters`` lose the cache; it is passed on to
them.

Sources: Wu et al., "ReFT: Representation Finetuning for Language Models", 2024, equations 2 and 3;
``adapters.methods.reft``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from adapters.methods.reft import ReftLayer, ReftModule
from torch import Tensor, nn

from reft_kernels import ownership
from reft_kernels.checks import mark_rows
from reft_kernels.integrations.adapters_units import (
    StackedUnits,
    UnitSettings,
    restore_signs,
    unit_settings,
)
from reft_kernels.model.backbone_session import BackboneSession
from reft_kernels.model.components import MODEL_INPUTS, Component, Target
from reft_kernels.model.editor import Editor
from reft_kernels.model.forward_context import Edit, ForwardContext
from reft_kernels.model.model_call import ModelCall
from reft_kernels.model.prompts import window_of_shape
from reft_kernels.model.selection import (
    DeferredSelection,
    PositionRule,
    Selection,
    TokenShape,
    select,
)
from reft_kernels.model.window import Window
from reft_kernels.positions import Spec, prompt_rows

PROMPTS = ("sequence", "labels")


# ---- Rows


def _rows(window: Window, spec: Spec, untied: bool) -> Selection | None:
    """Return the first and last tokens of each prompt, ``[B * (first + last)]`` rows.

    A token that is both is selected as one of the last.
    """
    if window.call.edit_positions is not None or window.packed is not None:
        return select(window, PositionRule(spec, untied))
    if window.lengths is None or window.starts is None:
        return None
    assert spec.per_example is not None  # the positions are first and last
    last = window.lengths.clamp(max=spec.last)
    parts = (
        (Spec("ends", spec.first, 0), window.lengths - last),
        (Spec("ends", 0, spec.last), window.lengths),
    )
    selected = [
        prompt_rows(part, window.starts, lengths, window.width, offset=window.offset)
        for part, lengths in parts
    ]
    rows = torch.cat([part.view(window.batch, -1) for part in selected], dim=1).flatten()
    ids = None
    # Two sets even if one has no positions, so that its gradient is zero as in adapters
    if untied:
        ids = (
            (torch.arange(spec.per_example, device=rows.device) >= spec.first)
            .to(torch.int32)
            .repeat(window.batch)
        )
        mark_rows(ids, 2)
    return Selection(mark_rows(rows, window.batch * window.width), ids)


class _ByShape(DeferredSelection):
    """Selection for a call without token inputs (images), whose prompts are whole sequences."""

    def _select(self, hidden: Tensor) -> Selection | None:
        window = window_of_shape(hidden.shape, hidden.device, self.call, self.frame_mask)
        return _rows(window, self.rule.spec, self.rule.untied)


# ---- The model


class _Group:
    """The layers of one backbone that an active adapter edits with the same settings."""

    def __init__(self, settings: UnitSettings, places: list[tuple[int, ReftModule]]) -> None:
        self.spec = settings.spec
        self.untied = not settings.tied
        self.sites = [site for site, _ in places]
        self.stack = StackedUnits(settings, [module for _, module in places])


class _BackboneSession(BackboneSession):
    """A backbone, edited by the adapters that are active according to ``adapters``."""

    def __init__(
        self, editor: Editor, backbone: nn.Module, component: Component, names: tuple[str, ...]
    ) -> None:
        super().__init__(editor, backbone, component)
        self.names = names  # argument names; the forward of adapters takes *args
        self.layers: list[tuple[int, ReftLayer]] = []
        self._known: dict[str, tuple[list[tuple[int, ReftModule]], list[_Group]]] = {}

    def active(self) -> list[_Group]:
        """Return the groups of the active adapters."""
        by_name: dict[str, list[tuple[int, ReftModule]]] = {}
        owners: dict[int, ReftLayer] = {}
        for site, layer in self.layers:
            setup = layer.get_active_setup()
            if setup is None:
                continue
            name = setup.first()
            if name not in layer.refts:
                continue
            if setup.parallel_channels > 1:
                raise ValueError(
                    f"active adapters: got {setup}, expected no Parallel block: ReFT's first "
                    "adapter edits all"
                )
            by_name.setdefault(name, []).append((site, layer.refts[name]))
            owners[site] = layer
        return [
            group
            for name, places in by_name.items()
            for group in self._groups(name, places, owners)
        ]

    def _groups(
        self, name: str, places: list[tuple[int, ReftModule]], owners: dict[int, ReftLayer]
    ) -> list[_Group]:
        """Return the groups of adapter ``name``, cached until its modules change."""
        known = self._known.get(name)
        if known is None or known[0] != places:
            by_settings: dict[UnitSettings, list[tuple[int, ReftModule]]] = {}
            for place in places:
                by_settings.setdefault(unit_settings(owners[place[0]], name), []).append(place)
            groups = [
                _Group(settings, group)
                for settings, group in by_settings.items()
                if settings.spec.per_example
            ]
            known = self._known[name] = (places, groups)
        return known[1]

    def _step(
        self,
        groups: Sequence[Any],  # of _Group, which takes the place of Adapter
        window: Window | None,
        call: ModelCall,
        arguments: Mapping[str, Any],
    ) -> ForwardContext | None:
        if call.scaling is not None:
            raise ValueError(
                "subspaces, strengths: got a value, expected None for adapters of this library; "
                "they are arguments of models with PEFT's ReFT adapters"
            )
        edits: dict[int, list[Edit]] = {}
        tokens = None if window is None else TokenShape(window.batch, window.width)
        for group in groups:
            rule = PositionRule(group.spec, group.untied)
            selection = _ByShape(rule, call) if window is None else _rows(window, *rule[:2])
            if selection is None:
                continue
            weights, device = group.stack(), group.stack.units[0].learned_source.weight.device
            for index, site in enumerate(group.sites):
                edits.setdefault(site, []).append(
                    Edit(group.stack, index, weights[index], selection, tokens, device)
                )
        return ForwardContext(edits, torch.is_grad_enabled()) if edits else None


class _Through:
    """Replaces a ReftLayer's forward, since the hidden states are already edited."""

    def __call__(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class _BeforeSaving:
    """Replaces a ReftLayer's ``pre_save_adapters`` to restore the signs before saving."""

    def __init__(self, layer: ReftLayer) -> None:
        self.layer = layer

    def __call__(self) -> None:
        restore_signs(self.layer)
        type(self.layer).pre_save_adapters(self.layer)


class _PassCache:
    """Forward pre-hook of a block that renames the cache argument ``past_key_values``.

    The Llama and Mistral classes of ``adapters`` use the name of an older transformers version.
    """

    def __call__(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if "past_key_values" in kwargs:
            kwargs = {**kwargs, "past_key_value": kwargs["past_key_values"]}
            del kwargs["past_key_values"]
        return args, kwargs


def _misses_cache(block: nn.Module) -> bool:
    names = inspect.signature(type(block).forward).parameters
    return "past_key_value" in names and "past_key_values" not in names


class _Editor(Editor):
    """The hooks that edit one model with its ReFT layers of ``adapters``."""

    def __init__(
        self, model: nn.Module, layers: dict[str, ReftLayer], *, token_labels: bool
    ) -> None:
        super().__init__(model, token_labels=token_labels)
        ownership.calibrate()
        self._open()
        split = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        for index, (path, layer) in enumerate(layers.items()):
            block = path.rsplit(".", 1)[0]
            target = Target(index, block, "output", layer.model_config.hidden_size, True)
            parts = block.split(".") if split else ()
            session = self._scope_of(target, "encoder" in parts, "decoder" in parts)
            session.layers.append((self._site(session, target), layer))
            module = model.get_submodule(block)
            if _misses_cache(module):
                self._handles.append(
                    module.register_forward_pre_hook(_PassCache(), with_kwargs=True)
                )

    def _scope_of(self, target: Target, encoder: bool, decoder: bool) -> _BackboneSession:
        """Return the session of the backbone that contains a block; create it if necessary."""
        path, names = _backbone(self.model, target.path)
        if path not in self._sessions:
            backbone = self.model.get_submodule(path)
            created = _BackboneSession(
                self, backbone, Component((target,), path, encoder, decoder), names
            )
            self._watch(created, path)
            self._sessions[path] = created
        session = self._sessions[path]
        assert isinstance(session, _BackboneSession)
        return session

    def active_in(self, session: BackboneSession) -> list[Any]:
        """Return the groups, which take the place of adapters, that are active in a session."""
        assert isinstance(session, _BackboneSession)
        return session.active()

    def edits_prompts_only(self) -> bool:
        """False: ``adapters`` edits tokens of each forward, generated ones included."""
        return False

    def close(self) -> None:
        """Remove every hook."""
        for session in self._sessions.values():
            session.prune()
        self._sessions.clear()
        self._close()


def _backbone(model: nn.Module, path: str) -> tuple[str, tuple[str, ...]]:
    """Find the backbone of a block.

    Returns:
        The path of the innermost ancestor whose forward takes a model's inputs, and the names of
        its arguments. Wrappers of ``adapters`` that take ``*args`` are ignored.

    Raises:
        ValueError: If there is no such ancestor.
    """
    parts = path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        ancestor = ".".join(parts[:depth])
        for cls in type(model.get_submodule(ancestor)).__mro__:
            forward = vars(cls).get("forward")
            if forward is None:
                continue
            names = tuple(inspect.signature(forward).parameters)[1:]
            if any(name in MODEL_INPUTS for name in names):
                return ancestor, names
    raise ValueError(f"model: no module above {path!r} takes one of {', '.join(MODEL_INPUTS)}")


class AcceleratedAdapters:
    """The result of :func:`accelerate_adapters`.

    :meth:`restore` undoes the acceleration, as does leaving a ``with`` block.
    """

    def __init__(
        self, model: nn.Module, layers: dict[str, ReftLayer], *, token_labels: bool
    ) -> None:
        self.model = model
        self._layers = list(layers.values())
        self._editor = _Editor(model, layers, token_labels=token_labels)
        for layer in self._layers:
            layer.__dict__["forward"] = _Through()
            layer.__dict__["pre_save_adapters"] = _BeforeSaving(layer)

    def restore(self) -> nn.Module:
        """Restore the original methods and return the model, with its current parameters.

        Further calls have no effect.
        """
        for layer in self._layers:
            restore_signs(layer)
            del layer.__dict__["forward"], layer.__dict__["pre_save_adapters"]
        self._layers = []
        self._editor.close()
        return self.model

    def __enter__(self) -> AcceleratedAdapters:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()


def accelerate_adapters(model: nn.Module, *, prompts: str = "sequence") -> AcceleratedAdapters:
    """Run the ReFT edits of an ``adapters`` model with the fused kernels.

    The model is changed in place; this includes adapters that are added later. ``add_adapter``,
    ``train_adapter``, ``set_active_adapters``, ``save_adapter``, ``load_adapter``, ``generate`` and
    ``AdapterTrainer`` work as before. R remains orthonormal under weight decay.

    Args:
        model: A model after ``adapters.init(model)``, or of an ``...AdapterModel`` class. Hidden
            states may be fp32, bf16 or fp16, and the adapters' parameters any floating-point dtype.
        prompts: What the prompt is if neither ``generate`` nor ``prompt_lengths=`` determines it:
            "sequence" for all real tokens of the call, as in ``adapters``, or "labels" for those
            before the first label other than -100.

    Returns:
        An :class:`AcceleratedAdapters`, with a method ``restore()``.

    Raises:
        ValueError: If ``prompts`` is invalid, the model has no ReFT layers of ``adapters`` or is
            already accelerated, or an adapter has an unsupported non_linearity or rank. The model
            is then unchanged.
    """
    if prompts not in PROMPTS:
        raise ValueError(f"prompts: got {prompts!r}, expected one of {', '.join(PROMPTS)}")
    layers = {path: m for path, m in model.named_modules() if isinstance(m, ReftLayer)}
    if not layers:
        raise ValueError(
            f"model: got {type(model).__name__} without ReFT layers, expected a model after "
            "adapters.init(model)"
        )
    if any("forward" in layer.__dict__ for layer in layers.values()):
        raise ValueError(
            f"model: this {type(model).__name__} is accelerated already, expected one after "
            "restore()"
        )
    for path, layer in layers.items():
        _backbone(model, path.rsplit(".", 1)[0])
        for name in layer.refts:
            unit_settings(layer, name)
    return AcceleratedAdapters(model, layers, token_labels=prompts == "labels")
