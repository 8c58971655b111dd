"""``accelerate_pyreft``: a pyreft model that keeps its modules and its interface and runs the
engine's edits.

Stands in for ``forward`` and ``generate`` of one model. A call builds the rows of its positions and
the rotations of all its layers once, and sets one hook a place, which runs one fused edit in place
on the selected rows; pyvene's own machinery (a clone of the sequence, two tensors from nested
lists, three orthogonal maps, gather and scatter for each place) does not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyvene import IntervenableModel
from pyvene.models.basic_utils import get_batch_size
from pyvene.models.intervenable_base import IntervenableModelOutput
from pyvene.models.intervenable_modelcard import type_to_module_mapping
from torch import Tensor

from reft_kernels.checks import describe, mark_rows, num_rows_of
from reft_kernels.integrations.pyreft.locations import (
    Locations,
    Selected,
    count_slots,
    read_locations,
)
from reft_kernels.integrations.pyreft.shipped import Edit, check_intervention, dropout_of, edits_of

_METHODS = ("forward", "generate")


def _hidden_of(key: str, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Tensor:
    """The hidden state that pyvene would edit: the first of a module's outputs, or, before it
    ran, of its inputs.
    """
    value = output if output is not None else (args or next(iter(kwargs.values()), None))
    if isinstance(value, tuple) and value:
        value = value[0]
    elif isinstance(value, Mapping) and value:
        value = next(iter(value.values()))
    if not isinstance(value, Tensor):
        raise TypeError(
            f"reft_model: {key!r} gave {describe(value)}, expected a hidden state or a tuple or "
            "dict that starts with one"
        )
    return value


class _Hook:
    """Edits one place's hidden state in place, as pyvene's setter does."""

    def __init__(self, call: _Call, key: str, edit: Edit, locations: Locations | None) -> None:
        self.call = call
        self.key = key
        self.edit = edit
        self.locations = locations
        self.intervention = call.reft_model.interventions[key]
        self.reached = 0

    def __call__(
        self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any = None
    ) -> None:
        is_prompt = self.reached == 0
        self.reached += 1
        if self.locations is not None and self.call.on_prompt not in (None, is_prompt):
            return
        hidden = _hidden_of(self.key, args, kwargs, output)
        selected = None
        if self.locations is not None:
            if hidden.dim() != 3:
                raise ValueError(
                    f"reft_model: {self.key!r} gave {describe(hidden)}, expected a hidden state "
                    "[B, T, d]"
                )
            selected = self.locations.on(hidden)
        edit = self._moved(hidden.device)
        dropout = dropout_of(self.intervention)
        if dropout is not None:
            self._edit_dropped(hidden, edit, dropout, selected)
        elif selected is None:
            edit(hidden, rows=self.call.every_row(hidden), inplace=True)
        else:
            count_slots(edit(hidden, rows=selected.rows, inplace=True), selected.repeated)

    def _edit_dropped(
        self, hidden: Tensor, edit: Edit, dropout: torch.nn.Module, selected: Selected | None
    ) -> None:
        """With pyreft's dropout, on every slot and in pyreft's order, so that the same random
        numbers fall.
        """
        where = slice(None) if selected is None else (selected.examples, selected.columns)
        slots = hidden if selected is None else hidden[where]
        hidden[where] = dropout(edit(slots, rows=self.call.every_row(slots)))

    def _moved(self, device: torch.device) -> Edit:
        """The edit with its weights on the hidden state's device."""
        weights = self.edit.keywords
        if all(not isinstance(w, Tensor) or w.device == device for w in weights.values()):
            return self.edit
        moved = {name: w.to(device) if isinstance(w, Tensor) else w for name, w in weights.items()}
        return type(self.edit)(self.edit.func, **moved)


class _Call:
    """One call of the model: hooks while it runs, the edits and positions that they share.

    Args:
        on_prompt: while generating, whether a place's first call (True) or all later ones (False)
            are edited; None outside.
    """

    def __init__(
        self,
        reft_model: IntervenableModel,
        locations: list[Locations | None],
        on_prompt: bool | None,
    ) -> None:
        self.reft_model = reft_model
        self.on_prompt = on_prompt
        edits = edits_of(reft_model.interventions)
        by_key = dict(zip(reft_model.sorted_keys, locations, strict=True))
        keys = [
            key for group in reft_model._intervention_group.values() for key in group
        ]  # the order in which pyvene edits
        self.hooks = [_Hook(self, key, edits[key], by_key[key]) for key in keys]
        self._handles: list[Any] = []
        self._every: dict[tuple[int, torch.device], Tensor] = {}

    def every_row(self, hidden: Tensor) -> Tensor | None:
        """Rows of an edit of every position: given for a graph, so that it keeps its input and
        others may edit its output.
        """
        if not torch.is_grad_enabled():
            return None
        key = (num_rows_of(hidden), hidden.device)
        if key not in self._every:
            self._every[key] = mark_rows(
                torch.arange(key[0], dtype=torch.int32, device=key[1]), key[0]
            )
        return self._every[key]

    def __enter__(self) -> _Call:
        for hook in self.hooks:
            self._handles.append(
                self.reft_model.intervention_hooks[hook.key](hook, with_kwargs=True)
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        again = [hook.key for hook in self.hooks if hook.reached > 1]
        if kind is None and self.on_prompt is None and again:
            raise RuntimeError(
                f"reft_model: {again[0]!r} ran more than once in one forward, expected each place "
                "once"
            )


class _Method:
    """Stands in for one method; an object and not a closure, so that a copied or pickled model
    gets one of the copy.
    """

    def __init__(self, acceleration: Acceleration) -> None:
        self.acceleration = acceleration


class _Forward(_Method):
    def __call__(
        self,
        base,
        sources=None,
        unit_locations=None,
        source_representations=None,
        subspaces=None,
        labels=None,
        output_original_output=False,
        return_dict=None,
        use_cache=None,
        intervention_additional_kwargs=None,
    ):
        """As pyvene's ``IntervenableModel.forward``."""
        own = self.acceleration
        if own.is_foreign(
            sources, source_representations, subspaces, intervention_additional_kwargs
        ):
            return own.original("forward")(
                base,
                sources,
                unit_locations,
                source_representations,
                subspaces,
                labels,
                output_original_output,
                return_dict,
                use_cache,
                intervention_additional_kwargs,
            )
        model = own.reft_model.model
        call = _Call(own.reft_model, own.locations(base, unit_locations, beams=False), None)
        base_outputs = model(**base) if output_original_output else None
        kwargs = {} if labels is None else {"labels": labels}
        if use_cache is not None and "use_cache" in model.config.to_dict():
            kwargs["use_cache"] = use_cache
        with call:
            outputs = model(**base, **kwargs)
        if return_dict:
            return IntervenableModelOutput(
                original_outputs=base_outputs,
                intervened_outputs=outputs,
                collected_activations=None,
            )
        return base_outputs, outputs


class _Generate(_Method):
    def __call__(
        self,
        base,
        sources=None,
        unit_locations=None,
        source_representations=None,
        intervene_on_prompt=False,
        subspaces=None,
        output_original_output=False,
        intervention_additional_kwargs=None,
        **kwargs,
    ):
        """As pyvene's ``IntervenableModel.generate``."""
        own = self.acceleration
        if own.is_foreign(
            sources, source_representations, subspaces, intervention_additional_kwargs
        ):
            return own.original("generate")(
                base,
                sources,
                unit_locations,
                source_representations,
                intervene_on_prompt,
                subspaces,
                output_original_output,
                intervention_additional_kwargs,
                **kwargs,
            )
        model = own.reft_model.model
        if not intervene_on_prompt and unit_locations is None:
            unit_locations = {"base": 0}  # the one token of each later step
        locations = own.locations(base, unit_locations, beams=True)
        with torch.no_grad():  # as model.generate runs
            call = _Call(own.reft_model, locations, bool(intervene_on_prompt))
        base_outputs = model.generate(**base, **kwargs) if output_original_output else None
        with call:
            return base_outputs, model.generate(**base, **kwargs)


class Acceleration:
    """What :func:`accelerate_pyreft` did to one model; :meth:`restore` (or leaving a ``with``
    block) undoes it.
    """

    def __init__(self, reft_model: IntervenableModel) -> None:
        self.reft_model = reft_model
        self._replaced = {
            name: reft_model.__dict__[name] for name in _METHODS if name in reft_model.__dict__
        }
        self._installed = {"forward": _Forward(self), "generate": _Generate(self)}
        reft_model.__dict__.update(self._installed)

    def restore(self) -> IntervenableModel:
        """Put back the methods that were there before; parameters were never moved. Returns the
        model.

        Raises:
            RuntimeError: already restored, or another wrapper was put on top since and has to go
                first.
        """
        methods = self.reft_model.__dict__
        if any(methods.get(name) is not method for name, method in self._installed.items()):
            raise RuntimeError(
                "restore: forward or generate is not this acceleration's own, expected wrappers "
                "undone in order"
            )
        for name in _METHODS:
            del methods[name]
        methods.update(self._replaced)
        return self.reft_model

    def __enter__(self) -> IntervenableModel:
        return self.reft_model

    def __exit__(self, *_: Any) -> None:
        self.restore()

    def original(self, name: str) -> Any:
        """The method that was replaced."""
        return (
            self._replaced[name]
            if name in self._replaced
            else getattr(type(self.reft_model), name).__get__(self.reft_model)
        )

    @staticmethod
    def is_foreign(
        sources: Any, source_representations: Any, subspaces: Any, additional: Any
    ) -> bool:
        """Whether a call says something that only pyvene understands."""
        given = sources if isinstance(sources, list) else [sources]
        return any(s is not None for s in (*given, source_representations, subspaces)) or bool(
            additional
        )

    def locations(
        self, base: Mapping[str, Any], unit_locations: Any, beams: bool
    ) -> list[Locations | None]:
        """Positions of each intervention, in the order of ``sorted_keys``."""
        model = self.reft_model
        if unit_locations is not None and not (
            isinstance(unit_locations, Mapping)
            and ("sources->base" in unit_locations or "base" in unit_locations)
        ):
            got = (
                sorted(map(str, unit_locations))
                if isinstance(unit_locations, Mapping)
                else describe(unit_locations)
            )
            raise ValueError(
                f"unit_locations: got {got}, expected a dict with 'sources->base' or 'base'"
            )
        fast = model.use_fast
        try:
            broadcast = model._broadcast_unit_locations(get_batch_size(base), unit_locations)
        finally:
            model.use_fast = (
                fast  # pyvene sets it for good, and then reuses the first example's positions
            )
        return read_locations(broadcast["sources->base"][1], len(model.sorted_keys), beams)


def _check_model(reft_model: IntervenableModel) -> None:
    if not isinstance(reft_model, IntervenableModel):
        raise TypeError(
            f"reft_model: got {type(reft_model).__name__}, expected a pyreft.ReftModel or "
            "pyvene.IntervenableModel"
        )
    if any(isinstance(reft_model.__dict__.get(name), _Method) for name in _METHODS):
        raise ValueError(
            "reft_model: is accelerated already, expected one that is not, or restore() first"
        )
    if reft_model.mode != "parallel":
        raise ValueError(f"reft_model: got mode {reft_model.mode!r}, expected 'parallel'")
    if not reft_model.is_model_stateless:
        raise ValueError("reft_model: got a recurrent model, expected a transformer")
    if reft_model.as_adaptor:
        raise ValueError(
            "reft_model: got as_adaptor=True, expected interventions that read the hidden state "
            "alone"
        )
    if reft_model._intervention_reverse_link:
        key = next(iter(reft_model._intervention_reverse_link))
        raise ValueError(
            f"reft_model: got an intervention_link_key on {key!r}, expected none (pass the same "
            "module instead)"
        )
    if not len(reft_model.interventions):
        raise ValueError("reft_model: got no interventions, expected at least one")
    splits = type_to_module_mapping.get(type(reft_model.model), {})
    for key, representation in reft_model.representations.items():
        if representation.unit != "pos":
            raise ValueError(
                f"reft_model: got unit {representation.unit!r} on {key!r}, expected 'pos'"
            )
        if len(splits.get(representation.component, ())) > 2:
            raise ValueError(
                f"reft_model: {key!r} edits a part of a module's output, expected a whole hidden "
                "state"
            )
        check_intervention(key, reft_model.interventions[key])


def accelerate_pyreft(reft_model: IntervenableModel) -> Acceleration:
    """Run a pyreft model's interventions by the engine's fused edits, in place; ``restore()`` on
    the result undoes it.

    ``reft_model(...)`` and ``reft_model.generate(...)`` take and return what they did; outputs and
    gradients are pyreft's to rounding. Modules, parameters, their names, optimizers, ``save``,
    ``load_intervention`` and ``print_trainable_parameters``
    are untouched: the edits read the shipped modules' own parameters at each call. With h a
    selected row:

        Loreft      h + (act(Wh + b) - hR) R^T          Direft      h + act(Wh + b) R^T
                    Consreft  h + (s - hR) R^T
        Noreft      h + (act(W1 h + b) - (W2 h + b2)) W2    Nodireft    h + act(W1 h + b) W2
                    Lobireft  h + s R^T

    Kept of pyreft: dropout acts on the edited state as a whole, on each slot by itself, and follows
    the intervention's own training flag, which ``reft_model.eval()`` does not reach; slots that
    stand twice are edited once and count twice in the gradient; the signs of R are truncated to
    integers, so that weight decay on ``rotate_layer`` zeroes R; while generating,
    ``intervene_on_prompt`` edits a place's first call, or all later ones.

    Different on purpose: positions are those of each example, always (pyvene's ``use_fast``, which
    any integer position switches on for good, scatters to the first example's); positions of B
    examples serve their beams too (pyvene raises, or for B = 1 copies the first beam's state into
    all); hooks that others set on the model stay; under autocast R stays fp32.

    Left to pyvene, as it is: calls with ``sources``, ``source_representations``, ``subspaces``
    (which the shipped classes ignore) or ``intervention_additional_kwargs``.

    Args:
        reft_model: a model of the shipped classes, unmodified (subclasses may not override
            ``forward``), in parallel mode, with unit ``pos``, on whole hidden states ``[B, T, d]``
            of fp32, bf16, fp16 or fp64, without linked interventions.

    Returns:
        The :class:`Acceleration`: ``restore()``, or a context manager that yields the model and
        restores at its end.

    Raises:
        TypeError: not such a model, or an intervention of another class. Nothing has then been
            changed.
        ValueError: accelerated already, an activation that the engine does not have, or a mode,
            unit, component or link that it does not serve. Nothing has then been changed.

    Source: Wu et al., "ReFT: Representation Finetuning for Language Models", 2024, equations 2 and
    3; pyreft 0.1, pyvene 0.1.8.
    """
    _check_model(reft_model)
    return Acceleration(reft_model)
