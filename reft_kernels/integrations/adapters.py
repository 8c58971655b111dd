"""AdapterHub's ReFT by the fused edit: ``accelerate_adapters(model)`` for a model that
``adapters.init`` prepared.

The package keeps what is its own: configurations, modules, parameters, active adapters, saving and
loading. Its layers' edits

    h + R^T (act(W h + b) - R h)         LoReFT; NoReFT with a free R, DiReFT without R h; dropout
                                         on the edited rows

are computed by this engine: R of all layers in one launch, one launch a layer for the rows, h
edited in place.

What is edited is the prompt, as in the paper: the first ``prefix_positions`` and last
``suffix_positions`` of its real tokens,
padded left or right. Decoding steps edit nothing: the prompt's edits live in the cache. The prompt
is the first of these that
is there: ``prompt_lengths=[...]`` given to the model; what ``generate`` was called with; with
``prompts="labels"`` the tokens before the first label that is not -100; the whole sequence of the
call, as the package has it. A token that is both first and last is edited once, as last. The
package's Llama and Mistral, which lose the cache on transformers 4.57, get it back.

Sources: Wu et al., "ReFT: Representation Finetuning for Language Models", 2024, equations 2 and 3;
``adapters.methods.reft``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from adapters.configuration import ReftConfig
from adapters.methods.reft import ReftLayer, ReftModule
from torch import Tensor, nn

from reft_kernels import arguments, ownership
from reft_kernels.activations import canonical_activation
from reft_kernels.arguments import RedWeights
from reft_kernels.autograd import apply_red
from reft_kernels.checks import mark_rows
from reft_kernels.dtypes import accumulation_dtype
from reft_kernels.integrations.torch_orthogonal import householder_chain, rotations
from reft_kernels.interventions import EditWeights, Intervention
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
from reft_kernels.parametrization import MAX_RANK
from reft_kernels.positions import Spec, prompt_rows

PROMPTS = ("sequence", "labels")


class _Kind(NamedTuple):
    """What layers must share for their weights to be stacked."""

    spec: Spec
    tied: bool
    width: int
    rank: int
    orthogonal: bool
    subtract_projection: bool
    activation: str


def _kind(layer: ReftLayer, name: str) -> _Kind:
    """The kind of adapter ``name`` in one layer; ValueError where the engine has no such edit."""
    module = layer.refts[name]
    unit = module.units[0]
    rank, width = unit.learned_source.weight.shape
    config = layer.adapters_config.match(
        name, ReftConfig, layer_idx=layer.layer_idx, location_key=layer.location_key
    )
    if rank > min(width, MAX_RANK):
        raise ValueError(f"r: adapter {name!r} has {rank}, expected at most {min(width, MAX_RANK)}")
    try:
        activation = canonical_activation(config.non_linearity)
    except ValueError as error:
        raise ValueError(f"non_linearity: adapter {name!r}: {error}") from None
    spec = Spec("ends", module.prefix_positions, module.suffix_positions)
    return _Kind(
        spec,
        module.tied_weights,
        width,
        rank,
        unit.orthogonal,
        unit.subtract_projection,
        activation,
    )


# ---- weights


def _signs(X: Tensor) -> Tensor:
    """Signs ``[..., r]`` of H(X)'s columns, which torch keeps on X's diagonal and reads as
    integers: decay makes them 0.
    """
    return torch.where(X.detach().diagonal(dim1=-2, dim2=-1) > 0, 1.0, -1.0).to(X.dtype)


@torch.no_grad()
def _mend(layer: ReftLayer) -> None:
    """Write whole signs back where an optimizer's decay shrank them, so that the package reads
    the R that was trained.
    """
    for module in layer.refts.values():
        for chain in filter(None, (householder_chain(unit.projection) for unit in module.units)):
            chain.original.diagonal().copy_(_signs(chain.original))


class _Units(Intervention):
    """The package's units of one kind, in the layers of one backbone, as a stacked intervention
    that owns no parameters.
    """

    def __init__(self, kind: _Kind, modules: list[ReftModule]) -> None:
        self.orthonormal, self.subtract_projection = kind.orthogonal, kind.subtract_projection
        super().__init__(
            kind.width,
            kind.rank,
            activation=kind.activation,
            init="orthogonal",
            num_sets=None if kind.tied else 2,
            _num_layers=len(modules),
        )
        self.spec = kind.spec
        self.units = [
            unit for module in modules for unit in module.units
        ]  # a list: the model holds them already

    def _make_parameters(self, **factory) -> None: ...  # the package has made them,

    def reset_parameters(self) -> None: ...  # and draws them

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return (parameter for unit in self.units for parameter in unit.parameters())

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        return (buffer for unit in self.units for buffer in unit.buffers())

    def forward(self) -> list[EditWeights]:
        """The weights of each layer."""
        return self.build()

    def _stack(self, tensors: list[Tensor]) -> Tensor:
        stacked = torch.stack([t.to(accumulation_dtype(t.dtype)) for t in tensors])
        return stacked.view(*self._lead, *stacked.shape[1:])

    def _write(self) -> Tensor:
        chains = [householder_chain(unit.projection) for unit in self.units]
        if None in chains:
            return self._stack([unit.projection.weight for unit in self.units])
        X = torch.stack([chain.original.mT for chain in chains]).contiguous()
        return self._stack(rotations(chains, X, _signs(X)))

    def _stacked_weights(self) -> tuple[Tensor, Tensor, Tensor, None, bool]:
        source = [unit.learned_source for unit in self.units]
        with torch.autocast(
            source[0].weight.device.type, enabled=False
        ):  # R in half precision would not be orthonormal
            read, bias, write = (
                self._stack([s.weight for s in source]),
                self._stack([s.bias for s in source]),
                self._write(),
            )
            if self.orthonormal and self.subtract_projection and self.activation == "linear":
                return read - write, bias, write, None, False
        return read, bias, write, None, self.subtract_projection

    def edit(
        self,
        hidden: Tensor,
        weights: EditWeights,
        *,
        rows: Tensor | None = None,
        weight_ids: Tensor | None = None,
        coeff: Tensor | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """The edit and, as the package has it, dropout of the edited rows' entries, drawn in the
        package's order.
        """
        edited = super().edit(
            hidden, weights, rows=rows, weight_ids=weight_ids, coeff=coeff, inplace=inplace
        )
        dropout = self.units[0].dropout
        if not dropout.training or dropout.p == 0.0:
            return edited
        count, per_example = rows.shape[0], self.spec.per_example
        parts = [count]
        if self.num_sets is not None and count % per_example == 0:
            parts = [self.spec.first, self.spec.last]
        ones = torch.ones(count // sum(parts), max(parts), self.embed_dim, device=hidden.device)
        kept = torch.cat([dropout(ones[:, :part]) for part in parts], dim=1).view(
            count, self.embed_dim
        )
        own = mark_rows(torch.arange(count, device=hidden.device, dtype=torch.int32), count)
        return apply_red(
            edited,
            RedWeights(kept, torch.zeros_like(kept)),
            arguments.Selection(rows, own),
            inplace,
        )


# ---- rows


def _rows(window: Window, spec: Spec, untied: bool) -> Selection | None:
    """First and last tokens of each prompt ``[B * (first + last)]``; where the two meet a token
    counts as last.
    """
    if window.call.edit_positions is not None or window.packed is not None:
        return select(window, PositionRule(spec, untied))
    if window.lengths is None:
        return None
    last = window.lengths.clamp(max=spec.last)
    parts = (
        (Spec("ends", spec.first, 0), window.lengths - last),
        (Spec("ends", 0, spec.last), window.lengths),
    )
    found = [
        prompt_rows(part, window.starts, lengths, window.width, offset=window.offset)
        for part, lengths in parts
    ]
    rows = torch.cat([part.view(window.batch, -1) for part in found], dim=1).flatten()
    ids = None
    # both sets whatever the positions, so that an idle one gets a zero gradient, as in the package
    if untied:
        ids = (
            (torch.arange(spec.per_example, device=rows.device) >= spec.first)
            .to(torch.int32)
            .repeat(window.batch)
        )
        mark_rows(ids, 2)
    return Selection(mark_rows(rows, window.batch * window.width), ids)


class _ByShape(DeferredSelection):
    """Rows of hidden states whose call names no tokens (images): all of a sequence is its
    prompt.
    """

    def _select(self, hidden: Tensor) -> Selection | None:
        window = window_of_shape(hidden.shape, hidden.device, self.call, self.frame_mask)
        return _rows(window, self.rule.spec, self.rule.untied)


# ---- the model


class _Group:
    """The layers of one backbone that one active adapter edits in one way."""

    def __init__(self, kind: _Kind, places: list[tuple[int, ReftModule]]) -> None:
        self.spec = kind.spec
        self.untied = not kind.tied
        self.sites = [site for site, _ in places]
        self.stack = _Units(kind, [module for _, module in places])


class _BackboneSession(BackboneSession):
    """One backbone whose adapters are those that the package says are active."""

    def __init__(
        self, editor: Editor, backbone: nn.Module, component: Component, names: tuple[str, ...]
    ) -> None:
        super().__init__(editor, backbone, component)
        self.names = names  # the package's own forward takes *args
        self.layers: list[tuple[int, ReftLayer]] = []
        self._known: dict[str, tuple[list[tuple[int, ReftModule]], list[_Group]]] = {}

    def active(self) -> list[_Group]:
        """The groups that edit now."""
        found: dict[str, list[tuple[int, ReftModule]]] = {}
        owners: dict[int, ReftLayer] = {}
        for site, layer in self.layers:
            setup = layer.get_active_setup()
            name = None if setup is None else setup.first()
            if name not in layer.refts:
                continue
            if setup.parallel_channels > 1:
                raise ValueError(
                    f"active adapters: got {setup}, expected no Parallel block: ReFT's first "
                    "adapter edits all"
                )
            found.setdefault(name, []).append((site, layer.refts[name]))
            owners[site] = layer
        return [
            group for name, places in found.items() for group in self._groups(name, places, owners)
        ]

    def _groups(
        self, name: str, places: list[tuple[int, ReftModule]], owners: dict[int, ReftLayer]
    ) -> list[_Group]:
        known = self._known.get(name)
        if known is None or known[0] != places:
            by_kind: dict[_Kind, list[tuple[int, ReftModule]]] = {}
            for place in places:
                by_kind.setdefault(_kind(owners[place[0]], name), []).append(place)
            groups = [
                _Group(kind, group) for kind, group in by_kind.items() if kind.spec.per_example
            ]
            known = self._known[name] = (places, groups)
        return known[1]

    def _step(
        self,
        groups: list[_Group],
        window: Window | None,
        call: ModelCall,
        arguments: Mapping[str, Any],
    ) -> ForwardContext | None:
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
    """Stands in for a ReftLayer's forward: what it would edit is edited already."""

    def __call__(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class _BeforeSaving:
    """Stands in for a ReftLayer's ``pre_save_adapters``."""

    def __init__(self, layer: ReftLayer) -> None:
        self.layer = layer

    def __call__(self) -> None:
        _mend(self.layer)
        type(self.layer).pre_save_adapters(self.layer)


class _PassCache:
    """Before a block: hands on the cache, which the package's Llama and Mistral take by the name
    of an older transformers.
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
    """The package's ReFT layers of one model, served by this engine's hooks."""

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
        path, names = _backbone(self.model, target.path)
        if path not in self._sessions:
            backbone = self.model.get_submodule(path)
            session = _BackboneSession(
                self, backbone, Component((target,), path, encoder, decoder), names
            )
            self._watch(session, path)
            self._sessions[path] = session
        return self._sessions[path]

    def active_in(self, session: _BackboneSession) -> list[_Group]:
        return session.active()

    def close(self) -> None:
        """Remove every hook."""
        for session in self._sessions.values():
            session.prune()
        self._sessions.clear()
        self._close()


def _backbone(model: nn.Module, path: str) -> tuple[str, tuple[str, ...]]:
    """The innermost ancestor of a block whose class, the package's wrappers apart, takes a
    model's inputs, and their names.
    """
    parts = path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        ancestor = ".".join(parts[:depth])
        for cls in type(model.get_submodule(ancestor)).__mro__:
            forward = vars(cls).get("forward")
            names = () if forward is None else tuple(inspect.signature(forward).parameters)[1:]
            if any(name in MODEL_INPUTS for name in names):
                return ancestor, names
    raise ValueError(f"model: no module above {path!r} takes one of {', '.join(MODEL_INPUTS)}")


class AcceleratedAdapters:
    """A model whose ReFT layers this engine serves; :meth:`restore` gives them back, as does
    leaving a ``with`` block.
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
        """Make the model the package's own again, with the parameters that it has now; a second
        call does nothing.
        """
        for layer in self._layers:
            _mend(layer)
            del layer.__dict__["forward"], layer.__dict__["pre_save_adapters"]
        self._layers = []
        self._editor.close()
        return self.model

    def __enter__(self) -> AcceleratedAdapters:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()


def accelerate_adapters(model: nn.Module, *, prompts: str = "sequence") -> AcceleratedAdapters:
    """Compute the ReFT edits of an ``adapters`` model by the fused kernels, those of adapters added
    later too.

    The model is changed in place and stays the package's: ``add_adapter``, ``train_adapter``,
    ``set_active_adapters``, ``save_adapter``, ``load_adapter``, ``generate`` and ``AdapterTrainer``
    work as before. Weight decay leaves R orthonormal.

    Args:
        model: after ``adapters.init(model)``, or of an ``...AdapterModel`` class; hidden states
            fp32, bf16 or fp16, the adapters' parameters of any floating dtype.
        prompts: what is a prompt where neither ``generate`` nor ``prompt_lengths=`` says:
            "sequence", all real tokens of the call, as in the package, or "labels", those before
            the first label that is not -100.

    Raises:
        ValueError: another ``prompts``; a model without ReFT layers of the package, or accelerated
            already; an adapter with a non_linearity or a rank that the engine does not have. The
            model is then as it was.
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
            _kind(layer, name)
    return AcceleratedAdapters(model, layers, token_labels=prompts == "labels")
