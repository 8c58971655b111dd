"""BREP: the edited tokens in training, prefill and decode steps. The edit itself is RED's."""

from __future__ import annotations

import pytest
import torch

from reft_kernels.related_methods import BREP, prefix_rows
from tests.related_methods import common

pytestmark = pytest.mark.usefixtures("poison")
D = 21


def _columns(rows: torch.Tensor, batch: int) -> list[list[int]]:
    """Return the edited columns of each example."""
    width = rows.shape[0] // batch
    edited = [[] for _ in range(batch)]
    for row in rows.tolist():
        if row >= 0:
            edited[row // width].append(row % width)
    return edited


@pytest.mark.parametrize(
    ("edit_prompt", "want"), [(True, [[0, 1, 2, 3, 4], [0, 1, 2, 3]]), (False, [[3, 4], [2, 3]])]
)
def test_whole_sequences(edit_prompt, want):
    rows = prefix_rows(torch.tensor([3, 2]), 7, 2, edit_prompt=edit_prompt)
    assert rows.dtype == torch.int32 and rows.shape == (14,) and _columns(rows, 2) == want


def test_padding_on_either_side():
    right = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    assert _columns(prefix_rows(torch.tensor([3, 2]), 6, 3, attention_mask=right), 2) == [
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4],
    ]
    left = right.flip(1)
    assert _columns(prefix_rows(torch.tensor([3, 2]), 6, 3, attention_mask=left), 2) == [
        [2, 3, 4, 5],
        [0, 1, 2, 3, 4],
    ]
    generated = prefix_rows(torch.tensor([3, 2]), 6, 3, edit_prompt=False, attention_mask=left)
    assert _columns(generated, 2) == [[5], [2, 3, 4]]


@pytest.mark.parametrize("edit_prompt", [True, False])
@pytest.mark.parametrize("chunks", [(6, 1, 1, 1, 1), (2, 4, 1, 1, 2), (1,) * 10])
def test_steps_of_generation_cover_what_one_forward_covers(chunks, edit_prompt):
    """A left-padded prompt in chunks and decode steps edit the same tokens as one forward."""
    lengths, tokens, total = torch.tensor([6, 4]), 3, sum(chunks)
    mask = torch.ones(2, total, dtype=torch.int64)
    mask[1, :2] = 0
    module = BREP(D, tokens, edit_prompt=edit_prompt)
    edited, offset = [[], []], 0
    for width in chunks:
        rows = module.rows(lengths, width, attention_mask=mask[:, : offset + width], offset=offset)
        for example, columns in enumerate(_columns(rows, 2)):
            edited[example] += [offset + c for c in columns]
        offset += width
    assert edited == _columns(module.rows(lengths, total, attention_mask=mask), 2)
    assert edited[1] == ([2, 3, 4, 5, 6, 7, 8] if edit_prompt else [6, 7, 8])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", common.DTYPES, ids=str)
def test_error_budget(dtype, inplace, backend, device):
    lengths = torch.tensor([2, 3], device=device)

    def formula(hidden, scale, bias):
        edited = torch.zeros(2, 6, 1, dtype=torch.bool, device=hidden.device)
        edited[0, :4] = edited[1, :5] = True
        return torch.where(edited, scale * hidden + bias, hidden)

    def make():
        module = common.randomized(BREP(D, 2, device=device))
        hidden = torch.randn(2, 6, D, device=device).to(dtype)
        return module, {"hidden": hidden}, {"rows": module.rows(lengths, 6)}, formula

    common.check(make, dtype, inplace=inplace, draws=common.draws(backend, device))


def test_starts_as_the_identity_and_later_tokens_are_untouched():
    module, hidden = BREP(D, 1), torch.randn(2, 6, D)
    rows = module.rows(torch.tensor([2, 3]), 6)
    with torch.no_grad():
        assert torch.equal(module(hidden, rows=rows), hidden)
        common.randomized(module)
        out = module(hidden, rows=rows)
    assert torch.equal(out[0, 3:], hidden[0, 3:]) and torch.equal(out[1, 4:], hidden[1, 4:])
    assert not torch.equal(out[0, :3], hidden[0, :3])


def test_bias_norm():
    module = common.randomized(BREP(D, 1))
    norm = module.bias_norm()
    norm.backward()
    assert float(norm.detach()) == pytest.approx(
        float(module.bias.detach().double().norm()), rel=1e-6
    )
    torch.testing.assert_close(module.bias.grad, (module.bias / norm).detach())


def test_refusals():
    with pytest.raises(ValueError, match="^tokens: got -1, expected an integer >= 0"):
        BREP(D, -1)
    lengths = torch.tensor([2, 3])
    with pytest.raises(TypeError, match="^prompt_lengths: got list"):
        prefix_rows([2, 3], 6, 2)
    with pytest.raises(ValueError, match=r"^prompt_lengths: got shape \(1, 2\)"):
        prefix_rows(lengths.view(1, 2), 6, 2)
    with pytest.raises(
        ValueError,
        match=r"^attention_mask: got shape \(2, 5\).*expected a tensor of shape \(2, 6\)",
    ):
        prefix_rows(lengths, 6, 2, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="^offset: got -1"):
        prefix_rows(lengths, 6, 2, offset=-1)
