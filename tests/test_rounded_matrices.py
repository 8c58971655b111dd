"""bf16 copies of the matrices of stacked modules, which GPU kernels read in the forward pass."""

from __future__ import annotations

import pytest
import torch

from reft_kernels import dispatch
from reft_kernels.arguments import BuiltWeights, RoundedMatrices
from reft_kernels.dispatch import interpreting
from reft_kernels.interventions import STACKED
from reft_kernels.model.accumulation import SharedBuild

LAYERS, D, R, ROWS = 2, 48, 4, 9
EDITS = [name for name in STACKED if name != "red"]


@pytest.fixture
def triton():
    pytest.importorskip("triton", reason="needs the package triton")
    if not (interpreting() or torch.cuda.is_available()):
        pytest.skip("needs a GPU, or the Triton interpreter (TRITON_INTERPRET=1)")
    with dispatch.backend("triton"):
        yield "cuda" if torch.cuda.is_available() else "cpu"


def _stack(name: str, device: str = "cpu", **kwargs):
    stack = STACKED[name](LAYERS, D, R, init="orthogonal", device=device, **kwargs)
    with torch.no_grad():
        for parameter in stack.parameters():
            if parameter.dim() > 2:
                parameter += 0.1 * torch.randn_like(parameter)
    return stack


def _bf16(tensor):
    return None if tensor is None else tensor.detach().bfloat16()


def _same(left, right) -> bool:
    return (left is None and right is None) or torch.equal(left, right)


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "no graph"])
@pytest.mark.parametrize("name", EDITS)
def test_copies_are_the_rounded_matrices_of_each_layer(name, graph):
    with torch.set_grad_enabled(graph):
        layers = _stack(name)()
    assert len(layers) == LAYERS
    for weights in layers:
        matrices, number = weights.rounded
        read, write = matrices.layer(number)
        assert _same(read, _bf16(weights.read)) and _same(write, _bf16(weights.write))
        assert not write.requires_grad


def test_copies_are_made_once_and_anew_after_a_modification():
    read, write = torch.randn(LAYERS, R, D), torch.randn(LAYERS, R, D)
    matrices = RoundedMatrices(read, write)
    first = matrices.layer(1)
    assert matrices.layer(1)[1] is first[1] and matrices.layer(0)[1] is not first[1]
    write[1].mul_(3)
    assert torch.equal(matrices.layer(1)[1], write[1].bfloat16())
    read.zero_()
    assert not matrices.layer(0)[0].any()


def test_optimizer_steps_change_the_copies():
    stack = _stack("nodireft")
    optimizer = torch.optim.SGD(stack.parameters(), lr=1.0)
    before = [weights.rounded[0].layer(0)[1].clone() for weights in stack()[:1]]
    for parameter in stack.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    (matrices, number), weights = stack()[0].rounded, stack()[0]
    assert torch.equal(matrices.layer(number)[1], weights.write.detach().bfloat16())
    assert not torch.equal(matrices.layer(number)[1], before[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_matrices_in_another_dtype_have_no_copies(dtype):
    assert all(weights.rounded is None for weights in _stack("nodireft", dtype=dtype)())


def test_a_shared_build_keeps_the_copies():
    stack = _stack("loreft")
    with SharedBuild() as shared:
        first, second = shared.weights(stack), shared.weights(stack)
        for one, other in zip(first, second, strict=True):
            assert type(one) is BuiltWeights and one.rounded is other.rounded is not None
            read, write = one.rounded[0].layer(one.rounded[1])
            assert _same(read, _bf16(one.read)) and _same(write, _bf16(one.write))


def _direct(hidden, weights, rows, read, write):
    args = (rows, None, read, weights.read_bias, write, None, None, weights.subtract_projection)
    return torch.ops.reft_kernels.edit(hidden, *args, "linear", False)[0]


@pytest.mark.parametrize("rows", [True, False], ids=["selected", "all"])
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "no graph"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_kernels_read_the_copies_for_bf16_only(triton, dtype, graph, rows):
    stack = _stack("loreft", triton)
    hidden = torch.randn(ROWS, D, device=triton).to(dtype)
    chosen = torch.tensor([1, 5, -1], dtype=torch.int32, device=triton) if rows else None
    with torch.set_grad_enabled(graph):
        weights = stack()[1]
        out = stack.edit(hidden, weights, rows=chosen)
    exact = _direct(hidden, weights, chosen, weights.read, weights.write)
    rounded = _direct(hidden, weights, chosen, _bf16(weights.read), _bf16(weights.write))
    assert torch.equal(out, rounded if dtype == torch.bfloat16 else exact)
    if rows:
        others = [n for n in range(ROWS) if n not in (1, 5)]
        assert torch.equal(out[others], hidden[others])


def test_gradients_are_those_of_fp32_weights(triton):
    """The parameters' gradients are fp32 and do not pass through a bf16 number."""
    stack = _stack("loreft", triton)
    hidden, grad = (torch.randn(ROWS, D, device=triton).bfloat16() for _ in range(2))
    results = []
    for drop in (False, True):
        weights = stack()[0]
        if drop:
            weights.rounded = None
        stack.zero_grad()
        stack.edit(hidden, weights).backward(grad)
        results.append({name: p.grad.clone() for name, p in stack.named_parameters()})
    for name, first in results[0].items():
        assert first.dtype == torch.float32
        assert first.any() and not torch.equal(first, first.bfloat16().float()), name
        error = (first - results[1][name]).norm() / results[1][name].norm()
        assert error < 2.0**-7, f"{name}: {error:.1e}"


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_other_backends_read_fp32(backend):
    reason = dispatch.unsupported_reason(backend, "edit", "cpu", torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)
    with dispatch.backend(backend):
        stack = _stack("loreft")
        weights = stack()[0]
        hidden = torch.randn(ROWS, D).bfloat16()
        exact = _direct(hidden, weights, None, weights.read, weights.write)
        assert torch.equal(stack.edit(hidden, weights), exact)
