"""Columns of R for each example: against pyreft's notebooks, pyvene's partitions and in a model."""

from __future__ import annotations

import pytest
import torch

from tests.integrations.pyreft_pairs import D, drop_in, moved, ours, pair, r

pytestmark = pytest.mark.transformers5


def _notebook(own, base, subspaces, scale=None):
    """LoReFT on chosen columns as pyreft's notebooks write it, example by example."""
    R = own.rotate_layer.weight
    diff = own.act_fn(own.learned_source(base)) - base @ R
    if scale is not None:
        diff = diff * torch.tensor(scale)
    rows = [
        b + d[:, chosen] @ R[:, chosen].T
        for b, d, chosen in zip(base, diff, subspaces, strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("act_fn", [None, "silu"])
def test_subspaces_choose_columns_for_each_example(act_fn):
    own, base = moved(ours("Loreft", act_fn=act_fn)), torch.randn(3, 2, D)
    for subspaces in ([[0, 1], [2], []], [[3, 0], [1], [0, 1, 2, 3]]):
        torch.testing.assert_close(own(base, subspaces=subspaces), _notebook(own, base, subspaces))
    torch.testing.assert_close(own(base, subspaces=[[1]]), _notebook(own, base, [[1]] * 3))
    torch.testing.assert_close(
        own(base, subspaces=torch.tensor([[0], [1], [2]])), _notebook(own, base, [[0], [1], [2]])
    )
    torch.testing.assert_close(own(base, subspaces=[[0, 1, 2, 3]] * 3), own(base))
    assert torch.equal(own(base, subspaces=[[], [], []]), base)


def test_subspace_gradients_stay_in_their_columns():
    own, base = moved(ours("Loreft")), torch.randn(2, 2, D)
    own(base, subspaces=[[0], [2]]).square().sum().backward()
    grad = own.learned_source.weight.grad
    assert grad[[0, 2]].abs().min() > 0 and not grad[[1, 3]].any()


@pytest.mark.parametrize("scale", [[1.0, 0.0, -1.0, 2.0], [-1.0] * 4])
def test_subspace_coeff_scales_columns(scale):
    own, base = moved(ours("Loreft", subspace_coeff=scale)), torch.randn(3, 2, D)
    subspaces = [[0, 1], [2], [3, 2]]
    torch.testing.assert_close(
        own(base, subspaces=subspaces), _notebook(own, base, subspaces, scale)
    )
    torch.testing.assert_close(own(base), _notebook(own, base, [[0, 1, 2, 3]] * 3, scale))
    own.subspace_coeff = None
    torch.testing.assert_close(own(base), _notebook(own, base, [[0, 1, 2, 3]] * 3))


@pytest.mark.parametrize("partition", [[[0, 2], [2, 4]], [[0], [1, 2, 3]], [[0, 2, 3], [1]]])
def test_das_partitions_equal_pyvenes(partition):
    own, original = pair("LowRankRotatedSpace", subspace_partition=partition)
    own, original = own.double(), original.double()
    base, source = torch.randn(3, D, dtype=torch.float64), torch.randn(3, D, dtype=torch.float64)
    cases = [[[0]] * 3, [[1]] * 3, [[0, 1]] * 3]
    if len({len(part) for part in own.subspace_partition}) == 1:  # pyvene stacks them
        cases.append([[0], [1], [0]])
    for subspaces in cases:
        torch.testing.assert_close(own(base, source, subspaces), original(base, source, subspaces))


def test_notebook_subclasses_work_on_the_drop_in():
    """pyreft's notebooks set subspace_coeff before the parent's __init__ and use the layers one
    by one.
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
    own = ours("Loreft", subspace_coeff=scale)
    own.load_state_dict(sub.state_dict())
    base = torch.randn(2, 3, D)
    torch.testing.assert_close(own(base), sub(base))
