"""Differentiable maps from unconstrained parameters to matrices with orthonormal rows.

The maps are :func:`householder` and :func:`cayley`. This module also has their inverses and the
preparation of base points.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reft_kernels import ops, orthonormal
from reft_kernels.dtypes import accumulation_dtype
from reft_kernels.orthonormal import MAX_RANK, PARAMETRIZATIONS, BasePoint

_ORTHONORMAL_TOLERANCE = 1e-4  # accepts R rounded to fp32, rejects R rounded to bf16


class _Build(torch.autograd.Function):
    """Computes R and D = W - R for all layers in one operator call, and their backward."""

    @staticmethod
    def forward(ctx, name, X, signs, base, base_point, W):
        R, D, aux = getattr(torch.ops.reft_kernels, name).default(X, signs, base, base_point, W)
        ctx.name, ctx.has_W = name, W is not None
        ctx.W_dtype = W.dtype if W is not None else None
        ctx.save_for_backward(X, signs, base, aux)
        ctx.set_materialize_grads(False)
        if W is None:
            ctx.mark_non_differentiable(D)
        return R, D

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_R, grad_D):
        X, signs, base, aux = ctx.saved_tensors
        if not ctx.has_W:
            grad_D = None
        grad_X = grad_W = None
        if ctx.needs_input_grad[1] and (grad_R is not None or grad_D is not None):
            operator = getattr(torch.ops.reft_kernels, f"{ctx.name}_backward").default
            grad_X = operator(grad_R, grad_D, X, signs, base, aux)
        if ctx.has_W and ctx.needs_input_grad[5] and grad_D is not None:
            grad_W = grad_D.to(ctx.W_dtype)
        return None, grad_X, None, None, None, grad_W


def _check_X(X: Tensor) -> None:
    if not isinstance(X, Tensor):
        raise TypeError(f"X: got {type(X).__name__}, expected a tensor [..., d, r]")
    if X.dim() < 2:
        raise ValueError(f"X: got shape {tuple(X.shape)}, expected [..., d, r]")
    if not X.dtype.is_floating_point:
        raise TypeError(f"X: got dtype {X.dtype}, expected a floating-point dtype")
    d, r = X.shape[-2:]
    if not 1 <= r <= min(d, MAX_RANK):
        raise ValueError(f"X: got d = {d}, r = {r}, expected 1 <= r <= min(d, {MAX_RANK})")


def _check_signs(signs: Tensor | None, X: Tensor) -> None:
    if signs is not None and (
        signs.shape != (*X.shape[:-2], X.shape[-1]) or signs.device != X.device
    ):
        raise ValueError(
            f"signs: got shape {tuple(signs.shape)} on {signs.device}, "
            f"expected {(*X.shape[:-2], X.shape[-1])} on {X.device}, as X says"
        )


def _resolve_base(
    base: Tensor | BasePoint | None, X: Tensor, signs: Tensor | None
) -> BasePoint | None:
    if base is None:
        return None
    if signs is not None:
        raise ValueError("signs: a base point brings its own, expected signs=None beside base")
    R = base.R if isinstance(base, BasePoint) else base
    expected = (*X.shape[:-2], X.shape[-1], X.shape[-2])
    if not isinstance(R, Tensor) or R.shape != expected or R.device != X.device:
        got = f"shape {tuple(R.shape)} on {R.device}" if isinstance(R, Tensor) else type(R).__name__
        raise ValueError(
            f"base: got {got}, expected an orthonormal R of shape {expected} on {X.device}"
        )
    return base if isinstance(base, BasePoint) else base_point(base)


def build(
    parametrization: str,
    X: Tensor,
    W: Tensor | None = None,
    *,
    signs: Tensor | None = None,
    base: BasePoint | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute R and optionally D = W - R, for all leading dimensions in one call.

    The shapes of the tensors are not checked.

    Args:
        parametrization: "householder" or "cayley".
        X: ``[..., d, r]``, any floating-point dtype.
        W: ``[..., r, d]`` or None.
        signs: ``[..., r]`` of +1 and -1, which multiply the rows of R, or None. Not differentiated.
        base: A prepared base point with the same leading dimensions, or None. Its signs replace
            ``signs``.

    Returns:
        R ``[..., r, d]`` in fp32 (fp64 for fp64 ``X``), and D with the same shape and dtype, or
        None without ``W``.

    Raises:
        ValueError: If ``parametrization`` is unknown.
    """
    if parametrization not in PARAMETRIZATIONS:
        raise ValueError(
            f"parametrization: got {parametrization!r}, expected one of "
            f"{', '.join(PARAMETRIZATIONS)}"
        )
    d, r = X.shape[-2:]
    lead = X.shape[:-2]
    flat = X.reshape(-1, d, r)
    signs = base.signs if base is not None else signs
    arguments = (
        flat,
        None if signs is None else signs.reshape(-1, r),
        None if base is None else base.reflectors.reshape(-1, d, r),
        None if base is None else base.R.reshape(-1, r, d),
        None if W is None else W.reshape(-1, r, d),
    )
    try:
        R, D = _Build.apply(parametrization, *arguments)
    except RuntimeError as error:
        raise ops.restored(error) from None
    return R.view(*lead, r, d), (None if W is None else D.view(*lead, r, d))


def householder(
    X: Tensor, base: Tensor | BasePoint | None = None, *, signs: Tensor | None = None
) -> Tensor:
    """Compute a matrix with orthonormal rows from a product of r Householder reflectors.

    R^T = H_1 ... H_r E, where H_i = I - 2 v_i v_i^T / |v_i|^2, v_i is column i of the unit lower
    trapezoidal part of ``X``, and E holds the first r columns of the identity. This equals
    ``torch.linalg.householder_product(X, 2 / |v|^2)`` and is computed in compact WY form. Entries
    of ``X`` on and above the diagonal are not read and have gradient zero.

    Args:
        X: ``[..., d, r]`` with 1 <= r <= min(d, 256), any floating-point dtype.
        base: An orthonormal R0 ``[..., r, d]``, or the :class:`BasePoint` that :func:`base_point`
            computed from it. X = 0 then gives exactly R0.
        signs: ``[..., r]`` of +1 and -1, which multiply the rows of R. Not differentiated, and not
            allowed together with ``base``.

    Returns:
        R ``[..., r, d]`` in fp32 (fp64 for fp64 ``X``), with max |R R^T - I| <= 1e-6 in fp32.

    Raises:
        TypeError: If ``X`` is not a floating-point tensor.
        ValueError: If an argument has the wrong shape or device, or ``base`` is not orthonormal.

    Source: Schreiber and Van Loan, "A storage-efficient WY representation for products of
    Householder transformations", 1989.
    """
    _check_X(X)
    _check_signs(signs, X)
    return build("householder", X, signs=signs, base=_resolve_base(base, X, signs))[0]


def cayley(
    X: Tensor, base: Tensor | BasePoint | None = None, *, signs: Tensor | None = None
) -> Tensor:
    """Compute a matrix with orthonormal rows from the Cayley map of a skew-symmetric matrix.

    R^T = (I - Z) (I + Z)^-1 E with Z = [[S, -K^T], [K, 0]], S = L - L^T, L = tril(X[:r], -1) and
    K = X[r:]. In closed form, R^T = [2C - I; -2KC] with C = (I + S + K^T K)^-1. Entries of
    ``X[:r]`` on and above the diagonal are not read and have gradient zero. X = 0 gives E^T, or
    exactly ``base``.

    The arguments, the result and the errors are those of :func:`householder`.

    Source: Wen and Yin, "A feasible method for optimization with orthogonality constraints", 2013,
    section 2.
    """
    _check_X(X)
    _check_signs(signs, X)
    return build("cayley", X, signs=signs, base=_resolve_base(base, X, signs))[0]


def orthonormality_error(R: Tensor) -> float:
    """Return max |R R^T - I| over all leading dimensions of R ``[..., r, d]``, computed in fp64."""
    R = R.detach().double()
    return (
        float((R @ R.mT - torch.eye(R.shape[-2], dtype=R.dtype, device=R.device)).abs().max())
        if R.numel()
        else 0.0
    )


def _checked_orthonormal(R: Tensor, name: str) -> Tensor:
    """Return R ``[..., r, d]`` in fp64, detached; raise ValueError if it is not orthonormal."""
    if R.dim() < 2 or not 1 <= R.shape[-2] <= min(R.shape[-1], MAX_RANK):
        raise ValueError(
            f"{name}: got shape {tuple(R.shape)}, expected [..., r, d] with 1 <= r <= min(d, "
            f"{MAX_RANK})"
        )
    error = orthonormality_error(R)
    if not error <= _ORTHONORMAL_TOLERANCE:
        raise ValueError(
            f"{name}: rows are not orthonormal, max |R R^T - I| = {error:.2e}, expected at most "
            f"{_ORTHONORMAL_TOLERANCE:.0e}; "
            "reft_kernels.orthonormalize(R) gives the nearest matrix that is"
        )
    return R.detach().double()


def orthonormalize(R: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal rows (the polar factor).

    Args:
        R: ``[..., r, d]``.

    Returns:
        A tensor with the shape and dtype of ``R``, computed in fp64.
    """
    U, _, Vh = torch.linalg.svd(R.detach().double(), full_matrices=False)
    return (U @ Vh).to(R.dtype)


def base_point(R: Tensor) -> BasePoint:
    """Prepare an orthonormal matrix as the base of :func:`householder` or :func:`cayley`.

    Takes O(d r^2) operations and forms no d x d matrix.

    Args:
        R: ``[..., r, d]``.

    Raises:
        ValueError: If the rows of R are not orthonormal.
    """
    X, signs = householder_inverse(R)
    flat = X.reshape(-1, *X.shape[-2:]).double()
    r = X.shape[-1]
    packed = flat.tril(-1)
    packed[:, :r] += orthonormal._householder_T(orthonormal._unit_lower(flat))
    dtype = accumulation_dtype(R.dtype)
    return BasePoint(R.detach().to(dtype).contiguous(), packed.view(X.shape).to(dtype), signs)


def householder_inverse(R: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``X`` and ``signs`` such that ``householder(X, signs=signs)`` is R up to rounding.

    Args:
        R: ``[..., r, d]`` with orthonormal rows.

    Returns:
        X ``[..., d, r]``, strictly lower triangular with entries of magnitude at most 1, and signs
        ``[..., r]``. Both are fp32 (fp64 for fp64 ``R``).

    Raises:
        ValueError: If the rows of R are not orthonormal.
    """
    Q = _checked_orthonormal(R, "R").mT
    X = torch.geqrf(Q.contiguous())[0].tril(-1)
    flat = X.reshape(-1, *X.shape[-2:])
    built = orthonormal.householder(flat, None, None, None, None)[0].view(R.shape)
    # LAPACK skips the reflection of a column that is already reduced, so compare signs with Q
    signs = torch.where((built * Q.mT).sum(-1) < 0, -1.0, 1.0)
    dtype = accumulation_dtype(R.dtype)
    return X.to(dtype), signs.to(dtype)


def cayley_inverse(R: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``X`` and ``signs`` such that ``cayley(X, signs=signs)`` is R up to rounding.

    The signs are chosen during the LU elimination of I + R^T[:r] diag(signs) so that every pivot is
    at least 1.

    Args:
        R: ``[..., r, d]`` with orthonormal rows.

    Returns:
        X ``[..., d, r]`` and signs ``[..., r]``, both fp32 (fp64 for fp64 ``R``).

    Raises:
        ValueError: If the rows of R are not orthonormal.
    """
    Q = _checked_orthonormal(R, "R").mT
    r = Q.shape[-1]
    eye = torch.eye(r, dtype=Q.dtype, device=Q.device)
    signs = torch.ones(*Q.shape[:-2], r, dtype=Q.dtype, device=Q.device)
    top = Q[..., :r, :].clone()
    lower = torch.zeros_like(top)
    for i in range(r):
        # Column i of the Schur complement of I + Q[:r] diag(signs), before signs[i] is chosen
        column = torch.linalg.solve_triangular(
            lower + eye, top[..., :, i : i + 1], upper=False, unitriangular=True
        )
        unit = torch.linalg.solve_triangular(
            lower + eye, eye[:, i : i + 1].expand_as(column), upper=False, unitriangular=True
        )
        signs[..., i] = torch.where(column[..., i, 0] * unit[..., i, 0] < 0, -1.0, 1.0)
        pivoted = unit[..., 0] + signs[..., i : i + 1] * column[..., 0]
        lower[..., i + 1 :, i] = pivoted[..., i + 1 :] / pivoted[..., i : i + 1]
    Q = Q * signs.unsqueeze(-2)
    twice_C = eye + Q[..., :r, :]
    K = -torch.linalg.solve(twice_C.mT, Q[..., r:, :].mT).mT
    inverse_C = 2 * torch.linalg.inv(twice_C)
    S = inverse_C - eye - K.mT @ K
    X = torch.cat([(0.5 * (S - S.mT)).tril(-1), K], dim=-2)
    dtype = accumulation_dtype(R.dtype)
    return X.to(dtype), signs.to(dtype)


INVERSES = {"householder": householder_inverse, "cayley": cayley_inverse}
