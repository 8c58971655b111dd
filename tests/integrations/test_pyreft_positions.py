"""Positions of pyreft, and the option that reproduces those of its dataset classes."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from reft_kernels import positions
from reft_kernels.integrations.peft import ReftConfig
from tests.model.families import make, shake

pytestmark = pytest.mark.transformers5

dataset = pytest.importorskip(
    "pyreft.dataset", reason="the package pyreft is not installed", exc_type=ImportError
)

WIDTH = 12


def theirs(spec: str, last_position: int) -> list[int]:
    """Return pyreft's columns for one example, with -1 as padding."""
    return dataset.get_intervention_locations(
        positions=spec, last_position=last_position, num_interventions=1, share_weights=True
    )[0]


def chosen(columns) -> list[int]:
    return sorted(int(c) for c in columns if c >= 0)


@pytest.mark.parametrize("length", range(1, WIDTH + 1))
@pytest.mark.parametrize("spec", ["f1+l1", "f2+l2", "f3+l5", "f7+l7"])
def test_both_ends_as_pyreft_counts_them(spec, length):
    assert chosen(positions.resolve(spec, [length], WIDTH)) == chosen(theirs(spec, length))


@pytest.mark.parametrize("length", range(1, WIDTH + 1))
@pytest.mark.parametrize("spec", ["f1+l1", "f2+l2", "f3+l5", "f7+l7", "f3", "l1", "l4"])
def test_the_switch_reproduces_the_dataset_classes(spec, length):
    """The dataset classes pass ``base_prompt_length - 1`` as the last position."""
    assert chosen(positions.resolve(spec, [length], WIDTH, pyreft_positions=True)) == chosen(
        theirs(spec, length - 1)
    )


@pytest.mark.parametrize("spec", ["f2+l2", "l1"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_switch_moves_the_edit_of_a_model(spec, packed):
    """The output equals that of pyreft's columns and differs from that without the option."""
    model = get_peft_model(
        make("llama"), ReftConfig(rank=4, positions=spec, pyreft_positions=True)
    ).eval()
    shake(model)
    plain = get_peft_model(make("llama"), ReftConfig(rank=4, positions=spec)).eval()
    plain.load_state_dict(model.state_dict())
    length = 9
    ids = torch.randint(3, 40, (1, WIDTH), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "prompt_lengths": torch.tensor([length])}
    if packed:
        inputs["position_ids"] = torch.arange(WIDTH)[None]
    columns = torch.tensor([chosen(theirs(spec, length - 1))])
    with torch.no_grad():
        switched = model(**inputs).logits
        assert torch.equal(switched, plain(input_ids=ids, edit_positions=columns).logits)
        assert not torch.equal(switched, plain(**inputs).logits)


def test_the_switch_is_saved(tmp_path):
    ReftConfig(rank=4, positions="l1", pyreft_positions=True).save_pretrained(tmp_path)
    assert ReftConfig.from_pretrained(tmp_path).spec == positions.parse("l1").as_pyreft()


def test_the_switch_needs_ends():
    with pytest.raises(ValueError, match="pyreft_positions: got True with positions 'all'"):
        positions.resolve("all", [3], 4, pyreft_positions=True)
