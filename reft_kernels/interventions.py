"""The family as modules: parameters, initialisation and the weights that an edit uses, for one
layer or L layers stacked.

An intervention holds fp32 parameters (by default) and edits hidden states of any floating dtype.
Where R is orthonormal it is a function of a free ``X`` (see :mod:`reft_kernels.parametrization`),
so no optimizer, decay or rounding can take it off the manifold. A stacked intervention keeps its
layers' parameters in one tensor each and builds R (and the folded D = W - R) for all of them in one
launch; its gradients come back through one stacked backward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from reft_kernels.activations import activate, canonical_activation
from reft_kernels.arguments import EditWeights, RedWeights, Selection
from reft_kernels.autograd import apply_edit, apply_red, operators_check
from reft_kernels.checks import check_edit, check_red
from reft_kernels.deprecation import renamed_argument
from reft_kernels.ops import restored
from reft_kernels.parametrization import INVERSES, MAX_RANK, PARAMETRIZATIONS, build

INITS = ("identity", "orthogonal")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}")
    return value


def _check_count(name: str, value: int, low: int, high: int | None) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < low
        or (high is not None and value > high)
    ):
        bounds = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
        raise ValueError(f"{name}: got {value!r}, expected {bounds}")
    return value


class Intervention(nn.Module):
    """What the members share: settings, the leading dimensions ``[L, S]``, caching of built
    weights, the edit itself.

    Args:
        embed_dim: d, the size of the hidden state's last dimension. rank: r, 1 to min(d, 256).
        activation: see :data:`reft_kernels.activations.ACTIVATIONS`. dropout: probability with
        which an entry of u is dropped in training (the residual stream never is).
        parametrization: ``"householder"`` or ``"cayley"``, for members with an orthonormal R. init:
        ``"identity"`` leaves the model unchanged at the start; ``"orthogonal"`` draws R from the
        uniform distribution and
            the rest as ``nn.Linear`` does. None: identity where the member has one.
        dtype: of the parameters, fp32 when None. device: of the parameters. num_sets: S weight
        sets, chosen for each row by ``weight_ids``; None for one set and no such dimension.

    Raises:
        ValueError: an argument out of range, or an init that the member does not have.
    """

    orthonormal = True  # the write matrix is R(X)
    reads = True  # there is a read matrix
    subtract_projection = False  # B h is subtracted

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
        self.embed_dim = _check_count("embed_dim", embed_dim, 1, None)
        self.rank = _check_count("rank", rank, 1, min(embed_dim, MAX_RANK))
        self.activation = canonical_activation(activation)
        if not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: got {dropout!r}, expected a probability in [0, 1)")
        self.dropout = float(dropout)
        self.parametrization = _check_choice("parametrization", parametrization, PARAMETRIZATIONS)
        self.num_sets = None if num_sets is None else _check_count("num_sets", num_sets, 1, None)
        self.num_layers = (
            None if _num_layers is None else _check_count("num_layers", _num_layers, 1, None)
        )
        reason = self._why_no_identity()
        if init is None:
            init = "identity" if reason is None else "orthogonal"
        self.init = _check_choice("init", init, INITS)
        if self.init == "identity" and reason is not None:
            raise ValueError(f"init: got 'identity', but {reason}; expected 'orthogonal'")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: got {dtype}, expected a floating-point dtype")
        self._lead = tuple(n for n in (self.num_layers, self.num_sets) if n is not None)
        self._built: tuple | None = None
        self._make_parameters(dtype=torch.float32 if dtype is None else dtype, device=device)
        self.reset_parameters()

    def _why_no_identity(self) -> str | None:
        return None

    def _make_parameters(self, **factory) -> None:
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
        """Draw the parameters anew, by ``init`` and torch's CPU generator (so one seed means one
        start on every device).
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
        """Set the parameters so that the edit changes nothing; members without an identity never
        get here.
        """

    @torch.no_grad()
    def set_R(self, R: Tensor) -> None:
        """Make R ``[..., r, d]`` the current one, exactly to rounding; its rows must be
        orthonormal.

        Raises:
            TypeError: this member has no orthonormal R. ValueError: another shape, or rows that are
                not orthonormal.
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
        """The orthonormal R ``[..., r, d]`` in fp32, differentiable with respect to X."""
        if not self.orthonormal:
            raise AttributeError(f"{type(self).__name__} has no orthonormal R")
        return build(self.parametrization, self.X, signs=self.signs)[0]

    # ---- built weights

    def _stacked_weights(self) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, bool]:
        read_bias = self.b if self.reads else self.s
        if not self.orthonormal:
            return self._read, read_bias, self.W2, None, self.subtract_projection
        if self.subtract_projection and self.reads and self.activation == "linear":
            R, D = build(self.parametrization, self.X, self.W, signs=self.signs)
            return D, read_bias, R, None, False
        R, _ = build(self.parametrization, self.X, signs=self.signs)
        return self._read, read_bias, R, None, self.subtract_projection

    def _state(self) -> tuple | None:
        """What the built weights depend on, or None when it cannot be known."""
        tensors = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
        if any(t.is_inference() for t in tensors):
            return None
        return tuple((t.data_ptr(), t._version, t.device, t.dtype) for t in tensors)

    def build(self) -> list[EditWeights] | list[RedWeights]:
        """The weights of each layer (a list of one for an unstacked intervention), R and D built in
        one launch.

        While no graph is needed (no gradients, or frozen parameters) they are saved_input and built
        again only after a change.
        """
        graph = torch.is_grad_enabled() and any(
            p.requires_grad for p in self.parameters(recurse=False)
        )
        if graph or torch.compiler.is_compiling():
            # a training step follows; some engines then change parameters behind the version
            # counter
            self._built = None
            return self._per_layer(self._stacked_weights())
        state = self._state()
        known = self._built  # read once: another thread may build, or forget
        if known is None or state is None or known[0] != state:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
            ):  # normal tensors: a later backward may save them
                known = self._built = (state, self._per_layer(self._stacked_weights()))
        return known[1]

    def _per_layer(self, stacked: tuple) -> list:
        kind = RedWeights if isinstance(self, RED) else EditWeights
        if self.num_layers is None:
            return [kind(*stacked)]
        # unbind, not indexing: its backward is one stack, where every index would fill a zero
        # tensor of all layers; a copy of what is a parameter itself, because engines that shard
        # parameters free their storage when this module's call returns
        owned = [t.clone() if isinstance(t, nn.Parameter) else t for t in stacked]
        columns = [t.unbind(0) if isinstance(t, Tensor) else (t,) * self.num_layers for t in owned]
        return [kind(*layer) for layer in zip(*columns, strict=True)]

    def train(self, mode: bool = True):
        self._built = None
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        self._built = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_built": None}

    # ---- the edit

    def _dropout_coeff(
        self, hidden: Tensor, rows: Tensor | None, coeff: Tensor | None
    ) -> Tensor | None:
        if not self.training or self.dropout == 0.0:
            return coeff
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
        """Edit ``hidden [..., d]`` with one layer's built weights; arguments as in
        :mod:`functional`, not checked.
        """
        chosen = Selection(rows, weight_ids, self._dropout_coeff(hidden, rows, coeff))
        return apply_edit(hidden, weights, chosen, self.activation, inplace)

    def _check(self, hidden: Tensor, weights, rows, weight_ids, coeff) -> None:
        matrices = (
            {"write": weights.write}
            if weights.read is None
            else {"write": weights.write, "read": weights.read}
        )
        check_edit(
            hidden,
            matrices,
            {"read_bias": weights.read_bias},
            rows,
            self.activation,
            coeff,
            weight_ids,
        )

    def _check_sets(self, weight_ids: Tensor | None) -> None:
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
        """The edited hidden state, ``[..., d]`` in ``hidden``'s dtype; see
        :mod:`reft_kernels.functional` for the arguments.
        """
        if set_ids is not None:
            weight_ids = renamed_argument("set_ids", set_ids, "weight_ids", weight_ids)
        self._check_sets(weight_ids)
        (weights,) = self.build()
        if not operators_check(hidden):
            self._check(hidden, weights, rows, weight_ids, coeff)
        try:
            return self.edit(
                hidden, weights, rows=rows, weight_ids=weight_ids, coeff=coeff, inplace=inplace
            )
        except Exception as error:
            self._check(hidden, weights, rows, weight_ids, coeff)  # says it in this module's words
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


class LoReFT(Intervention):
    """LoReFT: h + R^T (act(W h + b) - R h), R [r, d] with orthonormal rows (Wu et al. 2024,
    equation 2).
    """

    subtract_projection = True

    def _why_no_identity(self) -> str | None:
        return (
            None
            if self.activation == "linear"
            else f"LoReFT with activation {self.activation!r} is never the identity"
        )

    def _make_identity(self) -> None:
        self.W.copy_(self.R)
        self.b.zero_()


class DiReFT(Intervention):
    """DiReFT as the ablation of LoReFT: h + R^T act(W h + b), R [r, d] with orthonormal rows."""

    def _why_no_identity(self) -> str | None:
        return self._dead_at_zero()

    def _make_identity(self) -> None:
        self.W.zero_()
        self.b.zero_()


class NodiReFT(Intervention):
    """NodiReFT, what the paper calls DiReFT: h + W2^T act(W1 h + b), W1, W2 [r, d] free (Wu et
    al. 2024, equation 3).
    """

    orthonormal = False

    def _make_identity(self) -> None:
        self.W2.zero_()
        self.b.zero_()


class NoReFT(NodiReFT):
    """NoReFT: h + W2^T (act(W1 h + b) - W2 h), W1, W2 [r, d] free."""

    subtract_projection = True


class ConsReFT(Intervention):
    """ConsReFT: h + R^T (act(s) - R h), a constant source s [r]; it has no identity."""

    reads = False
    subtract_projection = True

    def _why_no_identity(self) -> str | None:
        return "ConsReFT replaces the projection R h by a constant, which no s leaves unchanged"


class LobiReFT(Intervention):
    """LobiReFT: h + R^T act(s), a constant write s [r]."""

    reads = False

    def _why_no_identity(self) -> str | None:
        return self._dead_at_zero()

    def _make_identity(self) -> None:
        self.s.zero_()


class RED(Intervention):
    """RED: scale * h + bias, elementwise over d; it has no rank, activation or dropout of its
    own.
    """

    orthonormal = False
    reads = False

    def __init__(self, embed_dim: int, rank: int = 1, **kwargs) -> None:
        super().__init__(embed_dim, rank, **kwargs)
        if self.activation != "linear" or self.dropout != 0.0:
            raise ValueError(
                f"activation, dropout: got {self.activation!r} and {self.dropout}, expected "
                "'linear' and 0.0: RED has neither"
            )

    def _make_parameters(self, **factory) -> None:
        self.scale = nn.Parameter(torch.empty(*self._lead, self.embed_dim, **factory))
        self.bias = nn.Parameter(torch.empty(*self._lead, self.embed_dim, **factory))

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.scale.fill_(1.0)
            self.bias.zero_()

    def _stacked_weights(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.bias

    def edit(
        self,
        hidden: Tensor,
        weights: RedWeights,
        *,
        rows: Tensor | None = None,
        weight_ids: Tensor | None = None,
        coeff: Tensor | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """Edit ``hidden [..., d]`` with one layer's weights; RED takes no ``coeff``."""
        if coeff is not None:
            raise ValueError("coeff: got a tensor, expected None: RED has no subspace")
        return apply_red(hidden, weights, Selection(rows, weight_ids), inplace)

    def _check(self, hidden: Tensor, weights: RedWeights, rows, weight_ids, coeff) -> None:
        check_red(hidden, weights.scale, weights.bias, rows, weight_ids)


class _Stacked:
    """L layers in one module: calling it builds every layer's weights, which
    :meth:`Intervention.edit` consumes.

    The build is the module's forward, so that engines which gather parameters around a forward
    (FSDP2, ZeRO-3) are right.
    """

    def __init__(self, num_layers: int, embed_dim: int, rank: int, **kwargs) -> None:
        super().__init__(embed_dim, rank, _num_layers=num_layers, **kwargs)

    def forward(self) -> list:
        return self.build()


class StackedLoReFT(_Stacked, LoReFT):
    """L layers of :class:`LoReFT`: X [L, d, r], W [L, r, d], b [L, r]."""


class StackedDiReFT(_Stacked, DiReFT):
    """L layers of :class:`DiReFT`: X [L, d, r], W [L, r, d], b [L, r]."""


class StackedNodiReFT(_Stacked, NodiReFT):
    """L layers of :class:`NodiReFT`: W2, W1 [L, r, d], b [L, r]."""


class StackedNoReFT(_Stacked, NoReFT):
    """L layers of :class:`NoReFT`: W2, W1 [L, r, d], b [L, r]."""


class StackedConsReFT(_Stacked, ConsReFT):
    """L layers of :class:`ConsReFT`: X [L, d, r], s [L, r]."""


class StackedLobiReFT(_Stacked, LobiReFT):
    """L layers of :class:`LobiReFT`: X [L, d, r], s [L, r]."""


class StackedRED(_Stacked, RED):
    """L layers of :class:`RED`: scale, bias [L, d]."""


STACKED: dict[str, type] = {
    "loreft": StackedLoReFT,
    "direft": StackedDiReFT,
    "nodireft": StackedNodiReFT,
    "noreft": StackedNoReFT,
    "consreft": StackedConsReFT,
    "lobireft": StackedLobiReFT,
    "red": StackedRED,
}
"""Name of an intervention -> its stacked class."""
