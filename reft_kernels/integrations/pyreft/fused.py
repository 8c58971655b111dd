"""What the drop-in classes share: rank, columns of R per example, checks, the edit, checkpoints,
train and eval.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from pyvene import IntervenableModel
from torch import Tensor, nn

from reft_kernels.autograd import apply_edit
from reft_kernels.checks import HIDDEN_DTYPES, check_count, describe, mark_rows, num_rows_of
from reft_kernels.conversion.orthogonal_state import BASE, ORIGINAL
from reft_kernels.integrations.pyreft.rotate import RotateLayer, weight_of_parametrization
from reft_kernels.integrations.pyreft.subspaces import coefficients
from reft_kernels.interventions import EditWeights
from reft_kernels.parametrization import MAX_RANK, _checked_orthonormal

SETTINGS = "reft_kernels"  # where a state dict's metadata holds dropout and act_fn


class FusedIntervention:
    """What the drop-in classes share: rank, columns of R per example, checks, the edit,
    checkpoints.

    Constructor keywords of every class (others, such as those of a pyvene representation, are
    accepted and ignored):

        embed_dim           d. low_rank_dimension: r, 1 to min(d, 256)
        keep_last_dim       hidden states come as ``[B, P, d]`` (ReFT) or flattened to ``[B, P *
                            d]`` (pyvene's default)
        subspace_partition  columns of R of each part that ``subspaces`` may name; pyvene's two
                            numbers (from, to) or lists
        subspace_coeff      r factors of R's columns, such as +1, 0, -1; an attribute too, None for
                            all 1
        same_random_draws   also draw the d x (d - r) numbers by which the original completes its
                            base, so that one seed starts
                            both alike (classes with a ``rotate_layer``)

    Raises:
        ValueError, TypeError: a keyword missing or out of range.
    """

    subspace_coeff: Tensor | Sequence[float] | None = None

    def _begin(self, kwargs: dict) -> None:
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

    # ---- the edit

    def _scale(self, device: torch.device) -> Tensor | None:
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
        """``[N, r]``: the examples' factors, repeated for their positions."""
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
        return table.repeat_interleave(num_rows_of(base) // batch, dim=0) if batch else table

    def _edit(
        self, base: Tensor, weights: EditWeights, activation: str, coeff: Tensor | None
    ) -> Tensor:
        rows = None
        if (
            torch.is_grad_enabled()
        ):  # keeps the rows for backward, so that the output may be changed and edits may be large
            count = num_rows_of(base)
            rows = mark_rows(torch.arange(count, dtype=torch.int32, device=base.device), count)
        return apply_edit(
            base,
            rows,
            None,
            weights.read,
            weights.read_bias,
            weights.write,
            weights.subtract_bias,
            coeff,
            weights.subtract_projection,
            activation,
            False,
        )

    # ---- checkpoints

    def _settings(self) -> dict:
        return {}

    def _adopt_settings(self, saved: dict) -> Callable[[], None]:
        """Check the settings of a checkpoint; what is returned takes those over that the
        constructor did not name.
        """
        return lambda: None

    def state_dict(self, *, destination=None, prefix: str = "", keep_vars: bool = False):
        """The original's state dict; ``rotate_layer`` as torch's parametrization, with its base
        ``[d, d]``.
        """
        found = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        found._metadata[prefix[:-1]][SETTINGS] = self._settings()
        return found

    def _renamed(self, state: dict, prefix: str) -> None:
        """Bring a class's own state dict form to the modules' names."""

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
                layer.to(
                    source.dtype
                )  # the parameters stay the same objects: an optimizer keeps them
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _check_state(self, state: dict, prefix: str) -> None:
        """Refuse a state dict before anything is changed; its parametrized R is replaced by the
        weight that it makes.
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
    """pyvene's ``train`` and ``eval`` change the base model alone: this one also sets the mode
    of the classes above.
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
