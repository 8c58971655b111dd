"""The adapter of a request."""

from __future__ import annotations

import json

import pytest

from reft_kernels.serving.errors import AdapterError
from reft_kernels.serving.requests import AdapterRequest, parse_request


def test_a_name_or_an_object_or_its_json():
    assert parse_request("german") == AdapterRequest("german", 1.0, None, None)
    full = {"adapter": "german", "coefficient": 2, "subspaces": [3, 1], "prompt_length": 4}
    expected = AdapterRequest("german", 2.0, (1, 3), 4)
    assert parse_request(full) == parse_request(json.dumps(full)) == expected
    assert isinstance(parse_request(full).coefficient, float)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "reft: got int 3"),
        ("", "adapter: got"),
        ("{broken", "no JSON object"),
        ({}, "adapter: got NoneType"),
        ({"adapter": 1}, "adapter: got int 1"),
        ({"adapter": "a", "scale": 1}, "unknown fields \\['scale'\\]"),
        ({"adapter": "a", "coefficient": "1"}, "coefficient: got str"),
        ({"adapter": "a", "coefficient": True}, "coefficient: got bool"),
        ({"adapter": "a", "coefficient": float("nan")}, "coefficient: got float nan"),
        ({"adapter": "a", "subspaces": []}, "subspaces: got"),
        ({"adapter": "a", "subspaces": [0, 0]}, "subspaces: got"),
        ({"adapter": "a", "subspaces": [-1]}, "subspaces: got"),
        ({"adapter": "a", "subspaces": [True]}, "subspaces: got"),
        ({"adapter": "a", "subspaces": 1}, "subspaces: got"),
        ({"adapter": "a", "prompt_length": 0}, "prompt_length: got int 0"),
        ({"adapter": "a", "prompt_length": 1.5}, "prompt_length: got float"),
    ],
)
def test_malformed_values_are_refused_by_field(value, message):
    with pytest.raises(AdapterError, match=message):
        parse_request(value)
