"""Base class of the interventions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from reft_kernels.activations import activate, canonical_activation
from reft_kernels.arguments import (
    BuiltWeights,
    EditWeights,
    RedWeights,
    RoundedMatrices,
    RowSelection,
)
from reft_kernels.autograd import apply_edit, operators_check
from reft_kernels.checks import check_choice, check_count, check_edit
from reft_kernels.deprecation import renamed_argument
from reft_kernels.operator_checks import as_built
from reft_kernels.ops import restored
from reft_kernels.parametrization import INVERSES, MAX_RANK, PARAMETRIZATIONS, build

INITS = ("identity", "orthogonal")


def with_rounded(layers: list, read: Tensor | None, write: Tensor) -> list:
    """Add bf16 copies to checked weights of fp32 matrices ``[L, ...]``; see RoundedMatrices."""
    matrices = [write] if read is None else [read, write]
    if isinstance(layers[0], BuiltWeights) and all(t.dtype == torch.float32 for t in matrices):
        rounded = RoundedMatrices(read, write)
        for number, layer in enumerate(layers):
            layer.rounded = (rounded, number)
    return layers


class Intervention(nn.Module):
    """Base class of the interventions.

    Parameters have leading dimensions ``[L, S]``: L layers if stacked, S weight sets if
    ``num_sets`` is given.

    Args:
        embed_dim: d, the last dimension of the hidden states.
        rank: r, from 1 to min(d, 256).
        activation: A name from :data:`reft_kernels.activations.ACTIVATIONS` or an alias.
        dropout: Probability of zeroing an entry of the update in the r-dimensional subspace during
            training.
        parametrization: "householder" or "cayley". Used only if R is orthonormal.
        init: With "identity", the edit initially changes nothing. With "orthogonal", R is drawn
            from the uniform distribution of orthonormal matrices and the other parameters as in
            ``nn.Linear``. None means "identity" if this intervention supports it, else
            "orthogonal".
        dtype: dtype of the parameters; None means fp32.
        device: Device of the parameters.
        num_sets: S, the number of weight sets, from which ``weight_ids`` selects one per row. None
            for a single set without that dimension.

    Raises:
        TypeError: If ``dtype`` is not a floating-point dtype.
        ValueError: If an argument is out of range or ``init`` is not supported.
    """

    orthonormal = True  # whether the write matrix is R(X)
    reads = True  # whether there is a read matrix
    subtract_projection = False  # whether the projection B h is subtracted
    signs: Tensor

    def __init__(
        self,
        embed_dim: int,
        rank: int,
        *,
        activation: str = "linear",
        dropout: float = 0.0,
        parametrization: str = "householder",
        init: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        num_sets: int | None = None,
        _num_layers: int | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = check_count("embed_dim", embed_dim, 1, None)
        self.rank = check_count("rank", rank, 1, min(embed_dim, MAX_RANK))
        self.activation = canonical_activation(activation)
        if not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: got {dropout!r}, expected a probability in [0, 1)")
        self.dropout = float(dropout)
        self.parametrization = check_choice("parametrization", parametrization, PARAMETRIZATIONS)
        self.num_sets = None if num_sets is None else check_count("num_sets", num_sets, 1, None)
        self.num_layers = (
            None if _num_layers is None else check_count("num_layers", _num_layers, 1, None)
        )
        reason = self._why_no_identity()
        if init is None:
            init = "identity" if reason is None else "orthogonal"
        self.init = check_choice("init", init, INITS)
        if self.init == "identity" and reason is not None:
            raise ValueError(f"init: got 'identity', but {reason}; expected 'orthogonal'")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: got {dtype}, expected a floating-point dtype")
        self._lead = tuple(n for n in (self.num_layers, self.num_sets) if n is not None)
        self._built: tuple[tuple | None, list[EditWeights] | list[RedWeights]] | None = None
        self._make_parameters(dtype=torch.float32 if dtype is None else dtype, device=device)
        self.reset_parameters()

    def _why_no_identity(self) -> str | None:
        """Return why ``init="identity"`` is not supported, or None if it is."""
        return None

    def _make_parameters(self, **factory: Any) -> None:
        """Create uninitialized parameters; ``factory`` holds their dtype and device."""
        d, r, lead = self.embed_dim, self.rank, self._lead
        if self.orthonormal:
            self.X = nn.Parameter(torch.empty(*lead, d, r, **factory))
            self.register_buffer("signs", torch.ones(*lead, r, **factory))
        else:
            self.W2 = nn.Parameter(torch.empty(*lead, r, d, **factory))
        if self.reads:
            self._set_read(nn.Parameter(torch.empty(*lead, r, d, **factory)))
            self.b = nn.Parameter(torch.empty(*lead, r, **factory))
        else:
            self.s = nn.Parameter(torch.empty(*lead, r, **factory))

    def _set_read(self, parameter: nn.Parameter) -> None:
        if self.orthonormal:
            self.W = parameter
        else:
            self.W1 = parameter

    @property
    def _read(self) -> nn.Parameter | None:
        return (self.W if self.orthonormal else self.W1) if self.reads else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize the parameters according to ``init``.

        Random numbers come from PyTorch's CPU generator, so that a seed gives the same values on
        every device.
        """
        if next(self.parameters()).is_meta:
            return
        bound = 1.0 / math.sqrt(self.embed_dim)
        for name, parameter in self.named_parameters():
            if name == "X":
                gaussian = torch.randn(*self._lead, self.embed_dim, self.rank, dtype=torch.float64)
                self.set_R(torch.linalg.qr(gaussian).Q.mT)
            else:
                drawn = torch.empty(parameter.shape, dtype=torch.float32).uniform_(-bound, bound)
                parameter.copy_(drawn)
        if self.init == "identity":
            self._make_identity()

    def _make_identity(self) -> None:
        """Set the parameters such that the edit changes nothing.

        Called only if :meth:`_why_no_identity` returns None.
        """

    @torch.no_grad()
    def set_R(self, R: Tensor) -> None:
        """Set the parameters such that :attr:`R` is the given matrix up to rounding.

        Args:
            R: ``[..., r, d]`` with the leading dimensions ``[L, S]`` of this intervention. Its rows
                must be orthonormal.

        Raises:
            TypeError: If this intervention has no orthonormal R.
            ValueError: If the shape is wrong or the rows are not orthonormal.
        """
        if not self.orthonormal:
            raise TypeError(f"{type(self).__name__} has no orthonormal R")
        expected = (*self._lead, self.rank, self.embed_dim)
        if tuple(R.shape) != expected:
            raise ValueError(f"R: got shape {tuple(R.shape)}, expected {expected}")
        X, signs = INVERSES[self.parametrization](R)
        self.X.copy_(X)
        self.signs.copy_(signs)

    @property
    def R(self) -> Tensor:
        """The orthonormal R ``[..., r, d]`` in fp32, differentiable with respect to ``X``.

        Raises:
            AttributeError: If this intervention has no orthonormal R.
        """
        if not self.orthonormal:
            raise AttributeError(f"{type(self).__name__} has no orthonormal R")
        return build(self.parametrization, self.X, signs=self.signs)[0]

    # ---- Weights computed from the parameters

    def _stacked_weights(self) -> tuple:
        """Return the fields of EditWeights (or RedWeights), with the leading dimensions."""
        read_bias = self.b if self.reads else self.s
        if not self.orthonormal:
            return self._read, read_bias, self.W2, None, self.subtract_projection
        if self.subtract_projection and self.reads and self.activation == "linear":
            R, D = build(self.parametrization, self.X, self.W, signs=self.signs)
            return D, read_bias, R, None, False
        R, _ = build(self.parametrization, self.X, signs=self.signs)
        return self._read, read_bias, R, None, self.subtract_projection

    def _state(self) -> tuple | None:
        """Return the identity and version of all parameters and buffers.

        Returns None for inference tensors, which have no version counter.
        """
        tensors = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
        if any(t.is_inference() for t in tensors):
            return None
        return tuple((t.data_ptr(), t._version, t.device, t.dtype) for t in tensors)

    def build(self) -> list[EditWeights] | list[RedWeights]:
        """Compute the weights of each layer from the parameters, in one call for all layers.

        If no gradient of the parameters is needed, the result is cached until a parameter changes.

        Returns:
            One entry per layer; a list of length 1 if the intervention is not stacked.
        """
        graph = torch.is_grad_enabled() and any(
            p.requires_grad for p in self.parameters(recurse=False)
        )
        if graph or torch.compiler.is_compiling():
            # Some training engines change parameters without increasing the version counter
            self._built = None
            return self._per_layer(self._stacked_weights())
        state = self._state()
        cached = self._built  # read once, since another thread may replace it
        if cached is not None and state is not None and cached[0] == state:
            return cached[1]
        # Not inference tensors, because a later backward pass may save the weights
        with torch.inference_mode(False), torch.no_grad():
            weights = self._per_layer(self._stacked_weights())
        self._built = (state, weights)
        return weights

    def _weights_of_layer(self, fields: tuple) -> EditWeights | RedWeights:
        """Make one layer's weights of the fields that :meth:`_stacked_weights` returns."""
        return EditWeights(*fields)

    def _per_layer(self, stacked: tuple) -> Any:
        """Split stacked weights into a list with one entry per layer."""
        if self.num_layers is None:
            return self._checked([self._weights_of_layer(stacked)])
        # Parameters are cloned, because engines that shard parameters free their storage when the
        # forward of this module returns
        fields = [t.clone() if isinstance(t, nn.Parameter) else t for t in stacked]
        # The backward of unbind is a single stack; each index would fill zeros for all layers
        columns = [t.unbind(0) if isinstance(t, Tensor) else (t,) * self.num_layers for t in fields]
        layers = self._checked(
            [self._weights_of_layer(layer) for layer in zip(*columns, strict=True)]
        )
        return with_rounded(layers, fields[0], fields[2]) if len(fields) > 2 else layers

    def _checked(self, layers: list) -> list:
        """Check the weights of all layers once, so that each edit need not do so."""
        first = layers[0]
        if torch.compiler.is_compiling() or not isinstance(first, EditWeights):
            return layers
        if not isinstance(as_built(first), BuiltWeights):
            return layers
        return [BuiltWeights(*weights) for weights in layers]

    def train(self, mode: bool = True):
        self._built = None
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        self._built = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_built": None}

    # ---- The edit

    def _dropout_coeff(
        self, hidden: Tensor, rows: Tensor | None, coeff: Tensor | None
    ) -> Tensor | None:
        """Return ``coeff`` multiplied by a dropout mask ``[N, r]``."""
        count = hidden.numel() // hidden.shape[-1] if rows is None else rows.shape[0]
        keep = 1.0 - self.dropout
        mask = (
            torch.empty((count, self.rank), dtype=torch.float32, device=hidden.device)
            .bernoulli_(keep)
            .div_(keep)
        )
        return mask if coeff is None else mask * coeff

    def edit(
        self,
        hidden: Tensor,
        weights: EditWeights | RedWeights,
        *,
        rows: Tensor | None = None,
        weight_ids: Tensor | None = None,
        coeff: Tensor | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """Edit hidden states with one layer's weights, without checking the arguments.

        Args:
            hidden: ``[..., d]``.
            weights: An entry of the result of :meth:`build`.
            rows: See :mod:`reft_kernels.functional`.
            weight_ids: See :mod:`reft_kernels.functional`.
            coeff: See :mod:`reft_kernels.functional`.
            inplace: See :mod:`reft_kernels.functional`.

        Returns:
            The edited hidden states, with the shape and dtype of ``hidden``.
        """
        assert isinstance(weights, EditWeights)
        if self.dropout and self.training:
            coeff = self._dropout_coeff(hidden, rows, coeff)
        selection = RowSelection(rows, weight_ids, coeff)
        return apply_edit(hidden, weights, selection, self.activation, inplace)

    def _check(
        self,
        hidden: Tensor,
        weights: EditWeights | RedWeights,
        rows: Tensor | None,
        weight_ids: Tensor | None,
        coeff: Tensor | None,
    ) -> None:
        """Check the arguments of :meth:`edit`; raises TypeError or ValueError."""
        assert isinstance(weights, EditWeights)
        matrices = {"write": weights.write}
        if weights.read is not None:
            matrices["read"] = weights.read
        biases = {} if weights.read_bias is None else {"read_bias": weights.read_bias}
        check_edit(hidden, matrices, biases, rows, self.activation, coeff, weight_ids)

    def _check_sets(self, weight_ids: Tensor | None) -> None:
        """Raise ValueError unless ``weight_ids`` is given exactly if there are weight sets."""
        if (weight_ids is None) != (self.num_sets is None):
            expected = (
                "None"
                if self.num_sets is None
                else f"an int32 tensor of set numbers below {self.num_sets}"
            )
            raise ValueError(
                f"weight_ids: got {'None' if weight_ids is None else 'a tensor'}, expected "
                f"{expected}"
            )

    def forward(
        self,
        hidden: Tensor,
        *,
        rows: Tensor | None = None,
        weight_ids: Tensor | None = None,
        coeff: Tensor | None = None,
        inplace: bool = False,
        set_ids: Tensor | None = None,
    ) -> Tensor:
        """Edit hidden states.

        Args:
            hidden: ``[..., d]``.
            rows: See :mod:`reft_kernels.functional`.
            weight_ids: See :mod:`reft_kernels.functional`. Required with ``num_sets``, not
                allowed without.
            coeff: See :mod:`reft_kernels.functional`.
            inplace: See :mod:`reft_kernels.functional`.
            set_ids: Deprecated name of ``weight_ids``.

        Returns:
            The edited hidden states, with the shape and dtype of ``hidden``.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape, device or values.
        """
        if set_ids is not None:
            weight_ids = renamed_argument("set_ids", set_ids, "weight_ids", weight_ids)
        self._check_sets(weight_ids)
        (weights,) = self.build()
        if not operators_check(hidden, rows, weight_ids):
            self._check(hidden, weights, rows, weight_ids, coeff)
        try:
            return self.edit(
                hidden, weights, rows=rows, weight_ids=weight_ids, coeff=coeff, inplace=inplace
            )
        except Exception as error:
            self._check(hidden, weights, rows, weight_ids, coeff)  # names this module's parameters
            raise restored(error) from None

    def extra_repr(self) -> str:
        text = (
            f"{self.embed_dim}, {self.rank}, activation={self.activation}, "
            f"dropout={self.dropout}, init={self.init}"
        )
        if self.orthonormal:
            text += f", parametrization={self.parametrization}"
        for name in ("num_layers", "num_sets"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)}"
        return text

    def _dead_at_zero(self) -> str | None:
        """Return why zero weights before the activation are no usable identity, or None."""
        zero = torch.zeros((), dtype=torch.float64)
        if float(activate(zero, self.activation)) != 0.0:
            return (
                f"activation {self.activation!r} is not 0 at 0, so {type(self).__name__} has no "
                "identity"
            )
        if self.activation == "relu":
            return (
                f"relu has no gradient at 0, so {type(self).__name__} could never leave the "
                "identity"
            )
        return None
