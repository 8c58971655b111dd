"""Suite 3: cost of building R with orthonormal rows, and its gradient.

One layer, and 32 layers in one call. ``torch.nn.utils.parametrizations.orthogonal``, which pyreft
uses, works on the d x d completion. "householder_product" is PyTorch's kernel on the d x r
reflectors without the completion, the fastest way in PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import reft_kernels
from benchmarks.harness import sets_for
from benchmarks.protocol import AccuracyCheck, Call, Case, CaseSpec, Provider, RunSettings
from reft_kernels import dispatch

TITLE = "Build of R"
ABOUT = (
    "orthonormal rows by Householder or Cayley, one layer and 32 stacked, forward and with the "
    "gradient"
)
SHAPES = (
    (1, 768, 8),
    (1, 2048, 8),
    (1, 4096, 8),
    (1, 4096, 32),
    (1, 8192, 8),
    (32, 4096, 8),
    (32, 4096, 1),
)
BASELINE = "parametrizations.orthogonal"
ONE_LAYER = "reft_kernels householder, one layer"
ORTHONORMAL = 1e-6
MOST_SETS = 32


def specs(settings: RunSettings) -> Iterator[CaseSpec]:
    """Yield every shape, forward and with the gradient."""
    for layers, d, rank in ((1, 256, 4), (4, 256, 4)) if settings.quick else SHAPES:
        for mode in ("forward", "both"):
            build = functools.partial(case, layers, d, rank, mode, settings.device)
            yield CaseSpec(mode, _shape(layers, d, rank), torch.float32, build)


def _shape(layers: int, d: int, rank: int) -> dict[str, object]:
    return {"layers": layers, "d": d, "r": rank}


def _product(X: Tensor) -> Tensor:
    """Apply PyTorch's kernel to the reflectors that reft_kernels reads from X.

    They are the columns of X below the diagonal, with ones on it.
    """
    lower = X.tril(-1)
    return torch.linalg.householder_product(lower, 2 / (1 + lower.square().sum(-2))).mT


def case(layers: int, d: int, rank: int, mode: str, device: str) -> Case:
    """Return one shape and mode."""
    torch.manual_seed(0)
    X = torch.randn(layers, d, rank, device=device) / d**0.5
    G = torch.randn(layers, rank, d, device=device)
    # on a GPU, inputs rotate past the cache as in the other suites
    sets = min(MOST_SETS, sets_for(2 * X.nbytes, device)) if device == "cuda" else 1

    def provider(
        function: Callable[[Tensor], Tensor], exact: Callable[[Tensor], Tensor]
    ) -> Provider:
        def prepare(_: int) -> Call:
            leaf = X.clone().requires_grad_()

            def forward(_: object) -> Tensor:
                with torch.no_grad():
                    return function(leaf)

            return Call(
                forward
                if mode == "forward"
                else lambda _: torch.autograd.grad(function(leaf), leaf, G)
            )

        return Provider(prepare, check=lambda: _check(function, exact, X, G))

    @functools.cache
    def orthogonal() -> Call:
        # one call for all input sets: its d x d matrix is larger than they are
        return _orthogonal(layers, d, rank, mode, device)

    providers = {
        "reft_kernels householder": provider(reft_kernels.householder, _product),
        "reft_kernels cayley": provider(reft_kernels.cayley, _cayley),
        "householder_product": provider(_product, _product),
        BASELINE: Provider(lambda _: orthogonal(), check=lambda: _check_orthogonal(d, rank)),
    }
    baseline = BASELINE
    if layers > 1:  # PyTorch has no batched kernel: it needs the time of one layer, repeated
        del providers[BASELINE], providers["householder_product"]
        baseline = ONE_LAYER
        providers[ONE_LAYER] = case(1, d, rank, mode, device).providers["reft_kernels householder"]
    moved = 2 * X.nbytes if mode == "forward" else 5 * X.nbytes
    return Case(
        "r_build",
        mode,
        _shape(layers, d, rank),
        X.dtype,
        providers,
        baseline,
        sets,
        moved,
        rounds=11,
    )


def _orthogonal(layers: int, d: int, rank: int, mode: str, device: str) -> Call:
    """Return the parametrization with its defaults.

    The weight is [d, rank] with orthonormal columns.
    """
    linear = torch.nn.Linear(rank, d, bias=False, device=device)
    torch.nn.utils.parametrizations.orthogonal(linear)
    leaf, grad = linear.parametrizations.weight.original, torch.randn(d, rank, device=device)

    def forward(_: object) -> Tensor:
        with torch.no_grad():
            return linear.weight

    return Call(
        forward if mode == "forward" else lambda _: torch.autograd.grad(linear.weight, leaf, grad)
    )


def _check_orthogonal(d: int, rank: int) -> AccuracyCheck:
    linear = torch.nn.Linear(rank, d, bias=False)
    torch.nn.utils.parametrizations.orthogonal(linear)
    return AccuracyCheck(reft_kernels.orthonormality_error(linear.weight.detach().mT), 1e-4)


def _cayley(X: Tensor) -> Tensor:
    """Compute the reference backend's map. The tests compare it with the dense definition."""
    with dispatch.backend("torch"):
        return reft_kernels.cayley(X)


def _check(
    function: Callable[[Tensor], Tensor], exact: Callable[[Tensor], Tensor], X: Tensor, G: Tensor
) -> AccuracyCheck:
    """Check that rows are orthonormal, and compare values and gradient with fp64."""

    def both(f: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = X.to(dtype).requires_grad_()
        R = f(leaf)
        return R.detach(), torch.autograd.grad(R, leaf, G.to(dtype))[0]

    pairs = zip(both(function, X.dtype), both(exact, torch.float64), strict=True)
    errors = [
        float((value.double() - reference).abs().max() / reference.abs().max())
        for value, reference in pairs
    ]
    error = reft_kernels.orthonormality_error(function(X))
    if error > ORTHONORMAL:
        return AccuracyCheck(error, ORTHONORMAL)
    return AccuracyCheck(max(errors), 256 * torch.finfo(X.dtype).eps)
