"""Occurrences of templates and spans of labels, compared with plain loops over lists."""

from __future__ import annotations

import pytest
import torch

from reft_kernels.model.response_rule import (
    earlier_turn_is_supervised,
    find_template,
    run_starts,
    supervised_spans,
)


def ends_by_loop(row: list[int], template) -> list[int]:
    return sorted(
        {
            c + len(ids)
            for ids in template
            for c in range(len(row))
            if tuple(row[c : c + len(ids)]) == ids
        }
    )


@pytest.mark.parametrize(
    "template", [((7, 8),), ((7,),), ((7, 8, 9), (8, 8)), ((1,) * 40,)], ids=str
)
def test_every_occurrence_is_found(template):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(6, 10, (50, 23), generator=generator)
    occurrences = find_template(ids, template)
    rows = zip(ids.tolist(), occurrences.after, occurrences.last.tolist(), strict=True)
    for row, after, last in rows:
        ends = ends_by_loop(row, template)
        assert after.nonzero().flatten().tolist() == ends
        assert last == (ends[-1] if ends else 0)


def test_an_occurrence_lies_within_one_segment():
    ids = torch.tensor([[7, 8, 7, 8, 7, 8]])
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert find_template(ids, ((7, 8),), segments).after.nonzero()[:, 1].tolist() == [2, 6]


def test_empty_batches_and_texts():
    assert find_template(torch.zeros(0, 5, dtype=torch.int64), ((7,),)).last.shape == (0,)
    assert find_template(torch.zeros(2, 0, dtype=torch.int64), ((7,),)).last.tolist() == [0, 0]


def test_spans_of_labels():
    labels = torch.tensor(
        [[-100, 1, 1, -100, 1], [1, 1, 1, 1, 1], [-100] * 5, [1, -100, -100, 1, -100]]
    )
    assert supervised_spans(labels).tolist() == [2, 1, 0, 2]
    starts = torch.tensor([[True, False, True, False, False]] * 4)
    assert run_starts(labels, starts).sum(1).tolist() == [3, 2, 0, 2]


def test_a_supervised_response_before_the_last():
    ids = torch.tensor(
        [[5, 7, 1, 1, 5, 7, 2, 2], [5, 7, 1, 1, 5, 7, 2, 2], [5, 5, 5, 5, 5, 7, 2, 2]]
    )
    labels = ids.clone()
    labels[1, :6] = -100
    occurrences = find_template(ids, ((7,),))
    assert earlier_turn_is_supervised(occurrences, labels).tolist() == [True, False, False]
