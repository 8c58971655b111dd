"""Base class of the drop-in replacements."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyvene import IntervenableModel
from torch import Tensor, nn

from reft_kernels.arguments import RowSelection
from reft_kernels.autograd import apply_edit
from reft_kernels.checks import HIDDEN_DTYPES, check_count, describe, mark_rows, num_rows_of
from reft_kernels.integrations.pyreft.rotate import RotateLayer, weight_of_parametrization
from reft_kernels.integrations.pyreft.subspaces import coefficients
from reft_kernels.integrations.torch_orthogonal_state import BASE, ORIGINAL
from reft_kernels.interventions import EditWeights
from reft_kernels.parametrization import MAX_RANK, _checked_orthonormal

SETTINGS = "reft_kernels"  # metadata key of a state dict under which dropout and act_fn are stored


class FusedIntervention(nn.Module):
    """Base class of the drop-in replacements.

    All classes take these keyword arguments. Others, such as those of a pyvene representation, are
    ignored.

    Args:
        embed_dim: d.
        low_rank_dimension: r, from 1 to min(d, 256).
        keep_last_dim: Whether hidden states are passed as ``[B, P, d]`` (pyreft) or flattened to
            ``[B, P * d]`` (pyvene's default).
        subspace_partition: The columns of R of each part that ``subspaces`` can select, as lists or
            as pyvene's pairs (from, to).
        subspace_coeff: r factors of the columns of R, such as +1, 0 and -1, or None for 1. This is
            also an attribute.
        same_random_draws: Also draw the d x (d - r) random numbers with which the original class
            completes its base, so that a seed gives the same initialization. Only for classes with
            a ``rotate_layer``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is missing or out of range.
    """

    subspace_coeff: Tensor | Sequence[float] | None = None
    subspace_partition: Sequence[Sequence[int]] | None  # set by pyvene's classes

    def _begin(self, kwargs: dict) -> None:
        """Check the common keyword arguments and store them."""
        for name in ("embed_dim", "low_rank_dimension"):
            if kwargs.get(name) is None:
                raise ValueError(f"{name}: got None, expected an integer")
        self._width = check_count("embed_dim", int(kwargs["embed_dim"]), 1, None)
        self._rank = check_count(
            "low_rank_dimension", kwargs["low_rank_dimension"], 1, min(self._width, MAX_RANK)
        )
        self._given = {
            name
            for name in ("dtype", "dropout", "act_fn", "add_bias")
            if kwargs.get(name) is not None
        }
        self._dtype = kwargs["dtype"] if "dtype" in self._given else torch.bfloat16
        if not (isinstance(self._dtype, torch.dtype) and self._dtype.is_floating_point):
            raise TypeError(f"dtype: got {self._dtype!r}, expected a floating-point torch.dtype")
        if kwargs.get("subspace_coeff") is not None:
            self.subspace_coeff = kwargs["subspace_coeff"]
            self._scale(torch.device("cpu"))

    def _rotate_layer(self, kwargs: dict) -> RotateLayer:
        return RotateLayer(
            self._width, self._rank, same_random_draws=bool(kwargs.get("same_random_draws"))
        )

    def _linear(self, bias: bool = True) -> nn.Linear:
        return nn.Linear(self._width, self._rank, bias=bias).to(self._dtype)

    # ---- The edit

    def _scale(self, device: torch.device) -> Tensor | None:
        """Return ``subspace_coeff`` as ``[r]`` in fp32, or None."""
        if self.subspace_coeff is None:
            return None
        scale = torch.as_tensor(self.subspace_coeff, dtype=torch.float32, device=device)
        if scale.dim() > 1 or scale.numel() not in (1, self._rank):
            raise ValueError(
                f"subspace_coeff: got shape {tuple(scale.shape)}, expected [{self._rank}], a "
                "factor for each column"
            )
        return scale.expand(self._rank)

    def _check_base(self, base: Tensor, device: torch.device) -> None:
        if not isinstance(base, Tensor) or base.dtype not in HIDDEN_DTYPES:
            raise TypeError(
                f"base: got {describe(base)}, expected a tensor of one of "
                f"{', '.join(map(str, HIDDEN_DTYPES))}"
            )
        if base.dim() < 2 or base.shape[-1] != self._width:
            raise ValueError(
                f"base: got shape {tuple(base.shape)}, expected [batch, ..., {self._width}]"
            )
        if base.device != device:
            raise ValueError(
                f"base: got device {base.device}, expected {device}, where the intervention is"
            )

    def _coeff(self, base: Tensor, subspaces) -> Tensor | None:
        """Return the factors of the columns of R for each row, ``[N, r]``, or None if all are 1."""
        if subspaces is None and self.subspace_coeff is None:
            return None
        batch = base.shape[0]
        table = coefficients(
            subspaces,
            self._scale(base.device),
            self.subspace_partition,
            batch,
            self._rank,
            base.device,
        )
        assert table is not None
        return table.repeat_interleave(num_rows_of(base) // batch, dim=0) if batch else table

    def _edit(
        self, base: Tensor, weights: EditWeights, activation: str, coeff: Tensor | None
    ) -> Tensor:
        rows = None
        if torch.is_grad_enabled():
            # With rows, an edit saves its input instead of its output, which may then be changed
            count = num_rows_of(base)
            rows = mark_rows(torch.arange(count, dtype=torch.int32, device=base.device), count)
        return apply_edit(base, weights, RowSelection(rows, None, coeff), activation, False)

    # ---- Checkpoints

    def _settings(self) -> dict:
        """Return the settings to store in a state dict."""
        return {}

    def _adopt_settings(self, saved: dict) -> Callable[[], None]:
        """Check the settings of a checkpoint.

        Returns:
            A function that adopts those settings that were not passed to the constructor.
        """
        return lambda: None

    def state_dict(
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """Return a state dict in the format of the original class.

        ``rotate_layer`` has the form of PyTorch's parametrization, with a base ``[d, d]``.
        """
        state = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        state._metadata[prefix[:-1]][SETTINGS] = self._settings()
        return state

    def _renamed(self, state: dict, prefix: str) -> None:
        """Rename the tensors of a class-specific format in ``state`` to the modules' names."""

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        self._renamed(state_dict, prefix)
        adopt = self._adopt_settings(local_metadata.get(SETTINGS) or {})
        self._check_state(state_dict, prefix)
        adopt()
        source = state_dict.get(prefix + "learned_source.weight")
        for layer in (m for m in self.children() if isinstance(m, nn.Linear)):
            if source is not None and "dtype" not in self._given:
                layer.to(source.dtype)  # keeps the parameter objects, which an optimizer may hold
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _check_state(self, state: dict, prefix: str) -> None:
        """Check a state dict before anything is changed.

        In ``state``, the parametrization of R is replaced by its weight.

        Raises:
            ValueError: If a tensor has the wrong shape, or R is not orthonormal.
        """
        d, r = self._width, self._rank
        rotate = prefix + "rotate_layer."
        expected = {prefix + name: tuple(p.shape) for name, p in self.named_parameters()}
        expected |= {rotate + "weight": (d, r), rotate + ORIGINAL: (d, r), rotate + BASE: (d, d)}
        for key, shape in expected.items():
            if key in state and tuple(state[key].shape) != shape:
                raise ValueError(
                    f"state_dict: {key} has shape {tuple(state[key].shape)}, expected {shape}"
                )
        if rotate + ORIGINAL in state and rotate + BASE in state:
            weight = weight_of_parametrization(
                state.pop(rotate + ORIGINAL), state.pop(rotate + BASE), f"state_dict: {rotate[:-1]}"
            )
            state[rotate + "weight"] = weight
        if rotate + "weight" in state:
            _checked_orthonormal(state[rotate + "weight"].mT, f"state_dict: {rotate}weight")


def _passing_mode_on(method: Callable) -> Callable:
    """Wrap ``train`` or ``eval`` of a pyvene model such that it also applies to interventions.

    pyvene only changes the mode of the base model.
    """

    @functools.wraps(method)
    def follow(self, *args, **kwargs):
        result = method(self, *args, **kwargs)
        for intervention in self.interventions.values():
            if isinstance(intervention, FusedIntervention):
                intervention.train(self.model.training)
        return result

    return follow


for _name in ("train", "eval"):
    setattr(IntervenableModel, _name, _passing_mode_on(getattr(IntervenableModel, _name)))
