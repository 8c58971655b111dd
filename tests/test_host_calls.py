"""The host library computes what Python does, with the same behaviour in autograd (cpu backend)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from reft_kernels import dispatch, host_calls
from reft_kernels.arguments import EditWeights, RowSelection
from reft_kernels.autograd import apply_edit

pytestmark = [
    pytest.mark.skipif(
        host_calls.library is None,
        reason=f"needs the host library: {host_calls.unavailable_reason()}",
    ),
    pytest.mark.skipif(
        not dispatch.serves_cpu_natively, reason="needs the native CPU library as the backend"
    ),
]

SHAPE, RANK = (2, 8, 32), 4
ROWS = {
    "ascending": [1, 4, 9, 15],
    "skipped": [-1, 4, -1, 15],
    "unsorted": [9, 1, 15, 4],
    "all": None,
}


class Edit:
    """An edit with weights that require grad, by the library or by Python."""

    def __init__(
        self,
        rows: list[int] | None,
        inplace: bool = True,
        dtype: torch.dtype = torch.float32,
        activation: str = "linear",
        subtract: bool = True,
        coeff: bool = False,
        weight_dtype: torch.dtype = torch.float32,
    ):
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        d, count = SHAPE[-1], 16 if rows is None else len(rows)
        self.leaf = random(*SHAPE).to(dtype).requires_grad_()
        self.scale = random(*SHAPE).to(dtype)
        weights = [random(RANK, d), random(RANK), random(RANK, d) / 8]
        weights += [random(RANK)] if subtract else []
        self.leaves = [w.to(weight_dtype).requires_grad_() for w in weights]
        self.coeff = random(count, RANK).requires_grad_() if coeff else None
        self.rows = None if rows is None else torch.tensor(rows, dtype=torch.int32)
        self.activation, self.subtract, self.inplace = activation, subtract, inplace

    def __call__(self, hidden: Tensor) -> Tensor:
        read, read_bias, write, *bias = self.leaves
        weights = EditWeights(read, read_bias, write, bias[0] if bias else None, self.subtract)
        selection = RowSelection(self.rows, None, self.coeff)
        return apply_edit(hidden, weights, selection, self.activation, self.inplace)

    def wanted(self) -> list[Tensor]:
        return [self.leaf, *self.leaves, *([] if self.coeff is None else [self.coeff])]

    def results(self) -> list[Tensor]:
        out = self(self.leaf * 1)
        grads = torch.autograd.grad(out, self.wanted(), self.scale)
        return [out.detach(), *grads]


@contextlib.contextmanager
def python_alone():
    used, host_calls.apply_edit = host_calls.apply_edit, None
    try:
        yield
    finally:
        host_calls.apply_edit = used


def is_library_node(tensor: Tensor) -> bool:
    return tensor.grad_fn is not None and tensor.grad_fn.name() == "EditBackward"


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16, "weight_dtype": torch.bfloat16},
        {"dtype": torch.float64, "weight_dtype": torch.float64},
        {"dtype": torch.float16},
        {"activation": "gelu"},
        {"subtract": False},
        {"coeff": True},
    ],
    ids=str,
)
def test_results_are_bit_identical_to_those_of_python(rows, inplace, options, poison):
    edit = Edit(ROWS[rows], inplace, **options)
    assert is_library_node(edit(edit.leaf * 1))
    found = edit.results()
    with python_alone():
        expected = edit.results()
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one, other)


@pytest.mark.parametrize("rows", ["ascending", "all"])
def test_only_the_gradients_asked_for_are_returned(rows):
    edit = Edit(ROWS[rows])
    expected = edit.results()[1:]
    for i, leaf in enumerate(edit.wanted()):
        (grad,) = torch.autograd.grad(edit(edit.leaf * 1), [leaf], edit.scale)
        assert torch.equal(grad, expected[i])
    for leaf in edit.leaves:
        leaf.requires_grad_(False)
    (grad,) = torch.autograd.grad(edit(edit.leaf * 1), [edit.leaf], edit.scale)
    assert torch.equal(grad, expected[0])


def test_gradients_that_others_hold_are_not_overwritten():
    edit = Edit(ROWS["ascending"])
    given = edit.scale.clone()
    seen: list[Tensor] = []
    edit(edit.leaf * 1).backward(given)
    assert torch.equal(given, edit.scale)
    out = edit(edit.leaf * 1)
    kept = out * 1
    kept.register_hook(seen.append)
    out.register_hook(seen.append)
    (kept * edit.scale).sum().backward()
    assert len(seen) == 2 and all(torch.equal(grad, edit.scale) for grad in seen)
    out = edit(edit.leaf * 1)
    out.retain_grad()
    out.backward(given)
    assert torch.equal(out.grad, edit.scale)
    out = edit(edit.leaf * 1)
    other = torch.zeros_like(out).requires_grad_()
    ((out + other) * edit.scale).sum().backward()  # the sum hands one gradient to both
    assert torch.equal(other.grad, edit.scale)


def test_graphs_are_kept_and_freed():
    edit = Edit(ROWS["ascending"])
    out = edit(edit.leaf * 1)
    first = torch.autograd.grad(out, edit.wanted(), edit.scale, retain_graph=True)
    second = torch.autograd.grad(out, edit.wanted(), edit.scale)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, edit.wanted(), edit.scale)


def test_accumulated_gradients():
    edit = Edit(ROWS["ascending"])
    expected = edit.results()[1:]
    for _ in range(2):
        edit(edit.leaf * 1).backward(edit.scale)
    for leaf, grad in zip(edit.wanted(), expected, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * grad)
    edit.leaves[0].grad.zero_()  # leaves the others, which may share its memory, alone
    torch.testing.assert_close(edit.leaves[2].grad, 2 * expected[3])


def test_second_derivatives_are_refused():
    edit = Edit(ROWS["ascending"])
    scale = edit.scale.clone().requires_grad_()
    (grad,) = torch.autograd.grad(edit(edit.leaf * 1), [edit.leaf], scale, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("changed", ["rows", "write"])
def test_modified_arguments_are_detected(changed):
    edit = Edit(ROWS["ascending"])
    out = edit(edit.leaf * 1)
    with torch.no_grad():
        (edit.rows if changed == "rows" else edit.leaves[2]).add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(edit.scale)


@pytest.mark.parametrize("rows", ["ascending", "all"])
def test_hooks_of_saved_tensors_see_them(rows):
    edit = Edit(ROWS[rows], activation="silu")
    expected = edit.results()
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = edit.leaf * 1
        packed.clear()
        out = edit(hidden)
    assert len(packed) == (6 if ROWS[rows] else 5)  # input, u, z, rows, read, write
    grads = torch.autograd.grad(out, edit.wanted(), edit.scale)
    for one, other in zip([out.detach(), *grads], expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    edit = Edit(ROWS["ascending"])
    expected = edit.results()[1:]
    out = checkpoint(lambda h: edit(h * 1), edit.leaf, use_reentrant=reentrant)
    out.backward(edit.scale)
    for leaf, grad in zip(edit.wanted(), expected, strict=True):
        assert torch.equal(leaf.grad, grad)


def test_anomaly_mode_and_deterministic_algorithms():
    edit = Edit(ROWS["ascending"])
    expected = edit.results()
    with torch.autograd.detect_anomaly(check_nan=True):
        found = edit.results()
    torch.use_deterministic_algorithms(True)
    try:
        again = edit.results()
    finally:
        torch.use_deterministic_algorithms(False)
    for one, two, three in zip(expected, found, again, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("part", ["both", "backward"])
def test_profilers_see_the_operators(part):
    edit = Edit(ROWS["ascending"])
    out = edit(edit.leaf * 1)
    assert is_library_node(out)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = edit(edit.leaf * 1) if part == "both" else out
        out.backward(edit.scale)
    names = {event.name for event in profile.events()}
    assert "reft_kernels::edit_backward" in names
    assert ("reft_kernels::edit_" in names) == (part == "both")


def test_errors_are_those_of_the_operators():
    repeated = Edit([1, 1, 2, 3])
    with pytest.raises(ValueError, match="row 1 occurs more than once"):
        repeated(repeated.leaf * 1)
    outside = Edit([1, 2, 3, 16])
    with pytest.raises(ValueError, match="expected row numbers in"):
        outside(outside.leaf * 1)
    edit = Edit(ROWS["ascending"])
    with pytest.raises((ValueError, RuntimeError), match="leaf"):
        edit(edit.leaf)


def test_modes_without_gradients():
    edit = Edit(ROWS["ascending"])
    expected = edit(edit.leaf * 1).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            hidden = edit.leaf * 1
            before = None if hidden.is_inference() else hidden._version
            out = edit(hidden)
            assert out is hidden and torch.equal(out, expected)
            assert before is None or hidden._version == before + 1


def _in_threads(count: int, run: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            for _ in range(50):
                run()
        except BaseException as error:  # raised again below
            errors.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads():
    expected = Edit(ROWS["ascending"]).results()

    def run() -> None:
        found = Edit(ROWS["ascending"]).results()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    _in_threads(4, run)


def test_compiled_autograd_is_refused_with_the_way_out():
    edit = Edit(ROWS["ascending"])
    out = edit(edit.leaf * 1)
    compiled = pytest.importorskip("torch._dynamo.compiled_autograd")
    with (
        compiled._enable(lambda graph: graph),
        pytest.raises(NotImplementedError, match="REFT_KERNELS_HOST_LIBRARY=0"),
    ):
        out.backward(edit.scale)
