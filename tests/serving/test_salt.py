"""Cache salts: equal exactly where the cached states are."""

from __future__ import annotations

import itertools

from reft_kernels.positions import parse
from reft_kernels.serving.positions import edited_ranges
from reft_kernels.serving.salt import cache_salt, unedited_salt


def _salt(
    spec="f2+l2", length=20, content="a", coefficient=1.0, subspaces=None, client=None, untied=False
):
    ranges = edited_ranges(parse(spec), untied, length)
    return cache_salt(content, ranges, coefficient, subspaces, client)


def test_everything_that_changes_a_state_changes_the_salt():
    salts = [
        _salt(),
        _salt(content="b"),
        _salt(coefficient=0.5),
        _salt(subspaces=(0,)),
        _salt(subspaces=(1,)),
        _salt(client="tenant"),
        _salt(client=""),
        _salt(untied=True),
        *(_salt(spec) for spec in ("f2", "l2", "prompt", "all")),
    ]
    for one, other in itertools.combinations(salts, 2):
        assert one != other


def test_the_length_counts_only_where_positions_depend_on_it():
    """Traps: "l7" and whole prompts with another length; prefixes must still share blocks."""
    for spec in ("l2", "f2+l2", "prompt"):
        assert _salt(spec, 20) != _salt(spec, 21)
    for spec in ("f4", "all"):
        assert _salt(spec, 20) == _salt(spec, 21)
    assert _salt("f4", 3) != _salt("f4", 20)  # all three tokens, not four


def test_a_client_cannot_name_the_states_of_an_adapter():
    ours = _salt()
    assert unedited_salt(ours) not in (ours, None)
    assert unedited_salt(unedited_salt(ours)) != ours
    assert unedited_salt("tenant") == "tenant" and unedited_salt(None) is None
