"""Edited columns of sequences that are computed in chunks."""

from __future__ import annotations

import pytest

from reft_kernels import positions
from reft_kernels.serving.positions import UNBOUNDED, covered, edited_ranges, template_end

SPECS = ("f3+l2", "f2+l4", "f5", "l3", "prompt")


def _columns(ranges, begin=0, end=200):
    return [n for low, high, _ in covered(ranges, begin, end) for n in range(low, high)]


@pytest.mark.parametrize(
    ("spec", "pyreft"), [*((s, False) for s in SPECS), *((s, True) for s in SPECS[:-1])]
)
def test_the_columns_are_those_of_the_models_forward(spec, pyreft):
    parsed = positions.parse(spec).as_pyreft() if pyreft else positions.parse(spec)
    for length in range(1, 14):
        expected = positions.resolve(spec, [length], 20, pyreft_positions=pyreft)
        got = _columns(edited_ranges(parsed, False, length))
        assert got == sorted(n for n in expected.tolist() if n >= 0), length


@pytest.mark.parametrize("spec", (*SPECS, "all"))
def test_chunks_edit_what_the_whole_sequence_does(spec):
    """Every way to cut a prompt and its reply into chunks selects the same columns, each once."""
    ranges = edited_ranges(positions.parse(spec), False, 11)
    whole = _columns(ranges, 0, 16)
    for size in range(1, 17):
        chunks = [_columns(ranges, n, min(n + size, 16)) for n in range(0, 16, size)]
        assert sum(chunks, []) == whole
    # a preempted request computes prompt and reply again, from the start or a cached prefix
    assert _columns(ranges, 8, 16) == [n for n in whole if n >= 8]


@pytest.mark.parametrize("spec", SPECS)
def test_generated_tokens_are_not_edited(spec):
    assert _columns(edited_ranges(positions.parse(spec), False, 11), 11, 60) == []


def test_all_edits_generated_tokens():
    (only,) = edited_ranges(positions.parse("all"), False, 11)
    assert only.end == UNBOUNDED and _columns((only,), 40, 43) == [40, 41, 42]


def test_last_positions_have_their_own_weights_if_untied():
    ranges = edited_ranges(positions.parse("f2+l2"), True, 9)
    assert [tuple(r) for r in ranges] == [(0, 2, 0), (7, 9, 1)]
    assert [r.weight_set for r in edited_ranges(positions.parse("f2+l2"), False, 9)] == [0, 0]


def test_a_prompt_of_one_token_has_no_halves():
    assert edited_ranges(positions.parse("f2+l2"), False, 1) == ()


def test_the_last_occurrence_of_any_template_ends_the_prompt():
    tokens = [1, 7, 8, 2, 7, 8, 3, 9, 4]
    assert template_end(tokens, [[7, 8]]) == 6
    assert template_end(tokens, [[7, 8], [9]]) == 8
    assert template_end(tokens, [[4, 9]]) is None
    assert template_end([7], [[7, 8]]) is None
    assert template_end([7, 8], [[7, 8]]) == 2
