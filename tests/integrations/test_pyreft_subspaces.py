"""Subspaces, that is selected columns of R per example, against pyreft's notebooks and pyvene."""

from __future__ import annotations

import pytest
import torch

from tests.integrations.pyreft_pairs import D, drop_in, moved, ours, pair, r

pytestmark = pytest.mark.transformers5


def _notebook(fused, base, subspaces, scale=None):
    """LoReFT on selected columns as in pyreft's notebooks, example by example."""
    R = fused.rotate_layer.weight
    diff = fused.act_fn(fused.learned_source(base)) - base @ R
    if scale is not None:
        diff = diff * torch.tensor(scale)
    rows = [
        b + d[:, chosen] @ R[:, chosen].T
        for b, d, chosen in zip(base, diff, subspaces, strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("act_fn", [None, "silu"])
def test_subspaces_choose_columns_for_each_example(act_fn):
    fused, base = moved(ours("Loreft", act_fn=act_fn)), torch.randn(3, 2, D)
    for subspaces in ([[0, 1], [2], []], [[3, 0], [1], [0, 1, 2, 3]]):
        torch.testing.assert_close(
            fused(base, subspaces=subspaces), _notebook(fused, base, subspaces)
        )
    torch.testing.assert_close(fused(base, subspaces=[[1]]), _notebook(fused, base, [[1]] * 3))
    torch.testing.assert_close(
        fused(base, subspaces=torch.tensor([[0], [1], [2]])),
        _notebook(fused, base, [[0], [1], [2]]),
    )
    torch.testing.assert_close(fused(base, subspaces=[[0, 1, 2, 3]] * 3), fused(base))
    assert torch.equal(fused(base, subspaces=[[], [], []]), base)


def test_subspace_gradients_stay_in_their_columns():
    fused, base = moved(ours("Loreft")), torch.randn(2, 2, D)
    fused(base, subspaces=[[0], [2]]).square().sum().backward()
    grad = fused.learned_source.weight.grad
    assert grad[[0, 2]].abs().min() > 0 and not grad[[1, 3]].any()


@pytest.mark.parametrize("scale", [[1.0, 0.0, -1.0, 2.0], [-1.0] * 4])
def test_subspace_coeff_scales_columns(scale):
    fused, base = moved(ours("Loreft", subspace_coeff=scale)), torch.randn(3, 2, D)
    subspaces = [[0, 1], [2], [3, 2]]
    torch.testing.assert_close(
        fused(base, subspaces=subspaces), _notebook(fused, base, subspaces, scale)
    )
    torch.testing.assert_close(fused(base), _notebook(fused, base, [[0, 1, 2, 3]] * 3, scale))
    fused.subspace_coeff = None
    torch.testing.assert_close(fused(base), _notebook(fused, base, [[0, 1, 2, 3]] * 3))


@pytest.mark.parametrize("partition", [[[0, 2], [2, 4]], [[0], [1, 2, 3]], [[0, 2, 3], [1]]])
def test_das_partitions_equal_pyvenes(partition):
    fused, original = pair("LowRankRotatedSpace", subspace_partition=partition)
    fused, original = fused.double(), original.double()
    base, source = torch.randn(3, D, dtype=torch.float64), torch.randn(3, D, dtype=torch.float64)
    cases = [[[0]] * 3, [[1]] * 3, [[0, 1]] * 3]
    if len({len(part) for part in fused.subspace_partition}) == 1:  # pyvene stacks them
        cases.append([[0], [1], [0]])
    for subspaces in cases:
        torch.testing.assert_close(
            fused(base, source, subspaces), original(base, source, subspaces)
        )


def test_notebook_subclasses_work_on_the_drop_in():
    """As in pyreft's notebooks, subspace_coeff is set before the parent's __init__.

    The layers are called one by one.
    """

    class Sub(drop_in.LoreftIntervention):
        def __init__(self, **kwargs):
            self.subspace_coeff = torch.tensor(kwargs.pop("subspace_coeff"))
            super().__init__(**kwargs)

        def forward(self, base, source=None, subspaces=None, **kwargs):
            diff = (
                self.act_fn(self.learned_source(base)) - self.rotate_layer(base)
            ) * self.subspace_coeff
            return self.dropout((base + diff @ self.rotate_layer.weight.T).to(base.dtype))

    scale = [1.0, 0.0, -1.0, 1.0]
    sub = Sub(embed_dim=D, low_rank_dimension=r, dtype=torch.float32, subspace_coeff=scale)
    fused = ours("Loreft", subspace_coeff=scale)
    fused.load_state_dict(sub.state_dict())
    base = torch.randn(2, 3, D)
    torch.testing.assert_close(fused(base), sub(base))
