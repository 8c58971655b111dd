"""``accelerate_pyreft``, which runs the interventions of a pyreft model with the fused operators.

It replaces ``forward`` and ``generate`` of a model. Each call computes the rows of its positions
and the rotations of all layers once, and registers one hook per place. The hook runs one fused edit
in place on the selected rows. It replaces pyvene's steps, which for each place clone the sequence,
build two tensors from nested lists, evaluate three orthogonal maps, gather and scatter.
"""

from __future__ import annotations

import functools
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
    """Return the hidden states that pyvene would edit.

    They are the first of the module's outputs, or of its inputs if ``output`` is None.
    """
    value: Any
    if output is not None:
        value = output
    else:
        value = args or (next(iter(kwargs.values())) if kwargs else None)
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
    """Hook that edits the hidden states of one place in place."""

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
        """Edit with pyreft's dropout, drawing the same random numbers as pyreft.

        Dropout is applied to every entry of the unit locations in pyreft's order.
        """
        where = slice(None) if selected is None else (selected.examples, selected.columns)
        slots = hidden if selected is None else hidden[where]
        hidden[where] = dropout(edit(slots, rows=self.call.every_row(slots)))

    def _moved(self, device: torch.device) -> Edit:
        """Return the edit with its weights on a device."""
        weights = self.edit.keywords
        if all(not isinstance(w, Tensor) or w.device == device for w in weights.values()):
            return self.edit
        moved = {name: w.to(device) if isinstance(w, Tensor) else w for name, w in weights.items()}
        return functools.partial(self.edit.func, **moved)


class _Call:
    """Context manager for one call of the model: it registers the hooks and removes them.

    Args:
        reft_model: The model.
        locations: The locations of each intervention, in the order of ``sorted_keys``; None for all
            positions.
        on_prompt: During generation, whether to edit the first call of a place (True) or the later
            ones (False). None outside generation.
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
        # The order in which pyvene edits
        keys = [key for group in reft_model._intervention_group.values() for key in group]
        self.hooks = [_Hook(self, key, edits[key], by_key[key]) for key in keys]
        self._handles: list[Any] = []
        self._every: dict[tuple[int, torch.device], Tensor] = {}

    def every_row(self, hidden: Tensor) -> Tensor | None:
        """Return the rows of an edit of all positions, or None without gradients.

        With rows, an edit saves its input for the backward pass instead of its output, so the
        output may be changed in place afterwards.
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
    """Replacement of a method.

    It is an object rather than a closure so that a copied or pickled model gets its own copy.
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
        """Run the model; arguments and results as in pyvene's ``IntervenableModel.forward``."""
        acceleration = self.acceleration
        if acceleration.needs_pyvene(
            sources, source_representations, subspaces, intervention_additional_kwargs
        ):
            return acceleration.original("forward")(
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
        model = acceleration.reft_model.model
        locations = acceleration.locations(base, unit_locations, beams=False)
        call = _Call(acceleration.reft_model, locations, None)
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
        """Generate; arguments and results as in pyvene's ``IntervenableModel.generate``."""
        acceleration = self.acceleration
        if acceleration.needs_pyvene(
            sources, source_representations, subspaces, intervention_additional_kwargs
        ):
            return acceleration.original("generate")(
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
        model = acceleration.reft_model.model
        if not intervene_on_prompt and unit_locations is None:
            unit_locations = {"base": 0}  # the single token of each later step
        locations = acceleration.locations(base, unit_locations, beams=True)
        with torch.no_grad():  # as in model.generate
            call = _Call(acceleration.reft_model, locations, bool(intervene_on_prompt))
        base_outputs = model.generate(**base, **kwargs) if output_original_output else None
        with call:
            return base_outputs, model.generate(**base, **kwargs)


class Acceleration:
    """The result of :func:`accelerate_pyreft`.

    :meth:`restore` undoes the acceleration. As a context manager it yields the model and restores
    it at the end.
    """

    def __init__(self, reft_model: IntervenableModel) -> None:
        self.reft_model = reft_model
        self._replaced = {
            name: reft_model.__dict__[name] for name in _METHODS if name in reft_model.__dict__
        }
        self._installed = {"forward": _Forward(self), "generate": _Generate(self)}
        reft_model.__dict__.update(self._installed)

    def restore(self) -> IntervenableModel:
        """Restore the original methods and return the model.

        Raises:
            RuntimeError: If the model has been restored already, or another wrapper was installed
                afterwards, which has to be removed first.
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
        """Return the original method with a name."""
        return (
            self._replaced[name]
            if name in self._replaced
            else getattr(type(self.reft_model), name).__get__(self.reft_model)
        )

    @staticmethod
    def needs_pyvene(
        sources: Any, source_representations: Any, subspaces: Any, additional: Any
    ) -> bool:
        """Return whether a call has arguments that only pyvene supports."""
        all_sources = sources if isinstance(sources, list) else [sources]
        return any(
            s is not None for s in (*all_sources, source_representations, subspaces)
        ) or bool(additional)

    def locations(
        self, base: Mapping[str, Any], unit_locations: Any, beams: bool
    ) -> list[Locations | None]:
        """Return the locations of each intervention, in the order of ``sorted_keys``.

        Args:
            base: Inputs of the model.
            unit_locations: As in pyvene.
            beams: Whether the hidden states may hold several sequences per example.

        Raises:
            TypeError: If a position is not an integer.
            ValueError: If ``unit_locations`` is invalid.
        """
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
            # pyvene leaves it set, and would then use the positions of the first example for all
            model.use_fast = fast
        return read_locations(broadcast["sources->base"][1], len(model.sorted_keys), beams)


def _check_model(reft_model: IntervenableModel) -> None:
    """Raise TypeError or ValueError if the model cannot be accelerated."""
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
    """Run the interventions of a pyreft model with the fused operators, in place.

    ``reft_model(...)`` and ``reft_model.generate(...)`` take and return the same values as before;
    outputs and gradients agree with pyreft up to rounding. Modules, parameters, optimizers,
    ``save``, ``load_intervention`` and ``print_trainable_parameters`` are not affected, because the
    edits read the parameters of the existing modules at each call. For a selected row h, with
    R = ``rotate_layer.weight`` ``[d, r]``:

        Loreft     h + (act(W h + b) - h R) R^T
        Direft     h + act(W h + b) R^T
        Consreft   h + (s - h R) R^T
        Lobireft   h + s R^T
        Noreft     h + (act(W1 h + b) - (W2 h + b2)) W2
        Nodireft   h + act(W1 h + b) W2

    As in pyreft:

    * Dropout acts on the whole edited state, separately for each entry of the unit locations. It
      follows the training mode of the intervention, which ``reft_model.eval()`` does not change.
    * A position that occurs k times is edited once and counts k times in the gradient.
    * The signs of R are truncated to integers, so weight decay on ``rotate_layer`` sets R to zero.
    * During generation, ``intervene_on_prompt`` selects the first call of a place or the later
      ones.

    Different from pyvene:

    * Each example has its own positions. (In pyvene an integer position enables ``use_fast``
      permanently, which then uses the positions of the first example.)
    * The positions of an example also apply to its beams. (pyvene raises an error, or for a single
      example copies the state of the first beam to all.)
    * Other hooks on the model are kept.
    * R remains in fp32 under autocast.

    Calls with ``sources``, ``source_representations``, ``subspaces`` (which pyreft's classes
    ignore) or ``intervention_additional_kwargs`` are passed to pyvene unchanged.

    Args:
        reft_model: A model in parallel mode with pyreft's intervention classes, or subclasses that
            do not override ``forward``. The unit must be ``pos``; the hidden states must be
            ``[B, T, d]`` in fp32, bf16, fp16 or fp64; interventions must not be linked.

    Returns:
        An :class:`Acceleration`, with a method ``restore()``. It is also a context manager.

    Raises:
        TypeError: If ``reft_model`` or one of its interventions has another class.
        ValueError: If the model is already accelerated, or its mode, an activation, unit, component
            or link is not supported. The model is then unchanged.

    Source: Wu et al., "ReFT: Representation Finetuning for Language Models", 2024, equations 2 and
    3; pyreft 0.1, pyvene 0.1.8.
    """
    _check_model(reft_model)
    return Acceleration(reft_model)
