"""Memory that is kept for a backward.

Edits of selected rows keep [N, d] + [N, r] of those rows. Edits of all rows keep no second copy of
the hidden state.
"""

from __future__ import annotations

import pytest
import torch

import reft_kernels as rk
from tests import inputs
from tests.inputs import Case

pytestmark = pytest.mark.engine

M, D, R = 24, 20, 3


def _saved_elements(edit, hidden, weights) -> tuple[int, set[int], torch.Tensor]:
    """Return the saved elements besides weights, the saved storages, and the output."""
    kept: dict[int, int] = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = edit(hidden)
    of_weights = {w.untyped_storage().data_ptr() for w in weights}
    return sum(n for key, n in kept.items() if key not in of_weights), set(kept), out


def _problem(backend, device, activation):
    case = Case((M,), D, R)
    weights = [w.requires_grad_() for w in inputs.weights("loreft", case, device=device).values()]
    R_, W, b = weights
    hidden = torch.randn(M, D, device=device, requires_grad=True) * 1
    return hidden, weights, lambda h, **kw: rk.loreft(h, R_, W, b, activation=activation, **kw)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("activation", ["linear", "gelu"])
def test_all_rows_keep_the_output_and_nothing_of_its_size(activation, inplace, backend, device):
    hidden, weights, edit = _problem(backend, device, activation)
    elements, storages, out = _saved_elements(lambda h: edit(h, inplace=inplace), hidden, weights)
    own_output = out.untyped_storage().data_ptr()
    assert own_output in storages
    assert elements - M * D == M * R * (1 if activation == "linear" else 2)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("activation", ["linear", "gelu"])
def test_selected_rows_keep_their_rows_alone(activation, inplace, backend, device):
    hidden, weights, edit = _problem(backend, device, activation)
    rows = inputs.rows(M, 5, device=device)
    elements, storages, out = _saved_elements(
        lambda h: edit(h, rows=rows, inplace=inplace), hidden, weights
    )
    assert out.untyped_storage().data_ptr() not in storages
    assert hidden.untyped_storage().data_ptr() not in storages
    row_numbers = 5
    assert elements == 5 * D + 5 * R * (1 if activation == "linear" else 2) + row_numbers


def test_without_gradients_nothing_is_kept(backend, device):
    hidden, weights, edit = _problem(backend, device, "gelu")
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            elements, _, out = _saved_elements(edit, hidden.detach(), weights)
        assert elements == 0 and not out.requires_grad


@pytest.mark.parametrize("inplace", [False, True])
def test_selected_rows_in_place_allocate_nothing_of_the_size_of_hidden(inplace, backend, device):
    """The cost of an in-place edit does not depend on the rows that are not selected."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        seen: list[int] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            for t in result if isinstance(result, tuple | list) else (result,):
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                    self.seen.append(t.numel())
            return result

    hidden, weights, edit = _problem(backend, device, "linear")
    sizes = Sizes()
    sizes.seen = []
    with sizes:
        edit(hidden, rows=inputs.rows(M, 5, device=device), inplace=inplace)
    assert (max(sizes.seen) >= M * D) != inplace
