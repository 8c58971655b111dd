"""What a search can vary, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from reft_train.errors import UserError
from reft_train.search.space import choices, layer_sets, parse, restored, small_space_of, space_of

from tests.reft_train.search.plans import config


def model(**sizes):
    """A configuration of these sizes."""
    return SimpleNamespace(get_text_config=lambda: SimpleNamespace(**sizes))


LLAMA_7B = model(hidden_size=4096, num_hidden_layers=32)


def test_an_entry_is_a_list_or_a_range():
    assert parse(["rank=[4, 8]", "head-lr={low: 1e-4, high: 1e-2, log: true}"], "loreft") == {
        "rank": choices((4, 8)),
        "head_lr": FloatDistribution(1e-4, 1e-2, log=True),
    }


def test_a_range_of_whole_numbers_stays_whole():
    assert parse(["rank={low: 2, high: 8}"], "loreft") == {"rank": IntDistribution(2, 8)}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("seed=[1, 2]", "'seed', expected settings that loreft can vary"),
        ("rnk=[1, 2]", "'rnk', expected settings that loreft can vary"),
        ("prefix_tokens=[1, 2]", "'prefix_tokens', expected settings that loreft can vary"),
        ("rank=4", "rank: got 4, expected a list"),
        ("rank=[]", "rank: got [], expected one or more values"),
        ("rank=[4, 4]", "expected one or more values, each once"),
        ("rank=[4, 400]", "rank: got 400, expected less than or equal to 256"),
        ("layers=[upper]", "layers: got 'upper', expected 'all' or layer numbers"),
        ("positions={low: f1, high: f3}", "expected a list: this setting is not a number"),
        ("share_weights={low: false, high: true}", "expected a list: this setting is not a number"),
        ("lr={low: 1e-2, high: 1e-4}", "expected low < high"),
        ("dropout={low: 0, high: 0.1, log: true}", "`low > 0` must hold"),
        ("rank={low: 1, high: 8, by: 2}", "expected a list or {low: ..., high: ..., log: true}"),
        ("rank={low: 1}", "expected a list or {low: ..., high: ..., log: true}"),
        ("rank", "expected NAME=VALUES"),
        ("rank=[4, 8", "expected ',' or ']'"),
    ],
)
def test_a_wrong_entry_is_named(entry, message):
    with pytest.raises(UserError) as caught:
        parse([entry], "loreft")
    assert message in str(caught.value) and str(caught.value).startswith("--vary")


def test_layers_are_stored_as_text_and_come_back_as_numbers():
    entry = choices(("all", [0, 2, 4]))
    assert [restored("layers", value) for value in entry.choices] == ["all", [0, 2, 4]]
    assert restored("lora_targets", "q_proj;v_proj") == ["q_proj", "v_proj"]


def test_the_default_varies_what_loreft_has(tmp_path):
    found = space_of(config(tmp_path), LLAMA_7B, encoder=False)
    assert set(found) == {"lr", "rank", "layers", "positions", "dropout", "parametrization"}


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("red", {"lr", "layers", "positions", "dropout"}),
        ("ia3", {"lr"}),
        ("lora", {"lr", "rank", "layers", "dropout"}),
        ("head", {"lr"}),
        ("prefix", {"lr", "prefix_tokens"}),
    ],
)
def test_the_default_leaves_out_what_a_method_does_not_have(tmp_path, method, names):
    assert set(space_of(config(tmp_path, method=method), LLAMA_7B, encoder=False)) == names


def test_default_layers_of_a_deep_model():
    assert layer_sets(LLAMA_7B) == choices(("all", list(range(1, 32, 2)), [4, 12, 20, 28]))


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_default_layers_of_a_shallow_model_exist_and_differ(depth):
    found = [
        restored("layers", value) for value in layer_sets(model(num_hidden_layers=depth)).choices
    ]
    assert all(sets == "all" or max(sets) < depth for sets in found)
    assert len({str(sets) for sets in found}) == len(found)


def test_default_ranks_fit_the_width(tmp_path):
    narrow = model(hidden_size=6, num_hidden_layers=2)
    assert small_space_of(config(tmp_path), narrow)["rank"] == choices((1, 2, 4))


def test_untied_weights_get_positions_at_both_ends(tmp_path):
    untied = config(tmp_path, share_weights=False, positions="f1+l1")
    assert space_of(untied, LLAMA_7B, encoder=True)["positions"] == choices(("f1+l1",))
