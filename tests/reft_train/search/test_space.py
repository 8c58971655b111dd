"""What a search can vary, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from reft_train.errors import UserError
from reft_train.search.space import (
    choices,
    layer_sets,
    parse,
    parse_flags,
    read,
    restored,
    small_space_of,
    space_of,
)

from tests.reft_train.search.plans import config


def model(**sizes):
    """A configuration of these sizes."""
    return SimpleNamespace(get_text_config=lambda: SimpleNamespace(**sizes))


LLAMA_7B = model(hidden_size=4096, num_hidden_layers=32)


def test_a_list_is_short_for_choices():
    assert parse({"rank": [4, 8]}, "loreft", "test") == parse(
        {"rank": {"choices": [4, 8]}}, "loreft", "test"
    )


def test_a_range_of_whole_numbers_stays_whole():
    assert parse({"rank": {"low": 2, "high": 8, "step": 2}}, "loreft", "test") == {
        "rank": IntDistribution(2, 8, step=2)
    }


def test_a_range_takes_numbers_that_yaml_reads_as_text(tmp_path):
    (tmp_path / "space.yaml").write_text("lr: {low: 1e-4, high: 1e-2, log: true}")
    assert read(tmp_path / "space.yaml", "loreft") == {
        "lr": FloatDistribution(1e-4, 1e-2, log=True)
    }


def test_a_flag_says_what_the_file_says():
    assert parse_flags(["rank=[4, 8]", "head-lr={low: 1e-4, high: 1e-2}"], "loreft") == {
        "rank": choices((4, 8)),
        "head_lr": FloatDistribution(1e-4, 1e-2),
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "got nothing, expected a mapping of settings"),
        ({"seed": [1, 2]}, "'seed', expected settings that loreft can vary"),
        ({"rnk": [1, 2]}, "'rnk', expected settings that loreft can vary"),
        ({"prefix_tokens": [1, 2]}, "'prefix_tokens', expected settings that loreft can vary"),
        ({"rank": 4}, "rank: got 4, expected a list"),
        ({"rank": []}, "rank: got [], expected one or more values"),
        ({"rank": [4, 4]}, "expected one or more values, each once"),
        ({"rank": [4, 400]}, "rank: got 400, expected less than or equal to 256"),
        ({"layers": ["upper"]}, "layers: got 'upper', expected 'all' or layer numbers"),
        (
            {"positions": {"low": "f1", "high": "f3"}},
            "expected choices: this setting is not a number",
        ),
        (
            {"share_weights": {"low": False, "high": True}},
            "expected choices: this setting is not a number",
        ),
        ({"lr": {"low": 1e-2, "high": 1e-4}}, "expected low < high"),
        ({"dropout": {"low": 0, "high": 0.1, "log": True}}, "`low > 0` must hold"),
        ({"lr": {"low": 1e-4, "high": 1e-2, "log": "yes"}}, "log true or false"),
        (
            {"lr": {"low": 1e-4, "high": 1e-2, "log": True, "step": 1e-4}},
            "`step` is not supported when `log`",
        ),
        ({"rank": {"low": 1, "high": 8, "step": 0.5}}, "expected a whole step"),
        ({"rank": {"low": 1, "high": 8, "by": 2}}, "expected a list, {choices: [...]}"),
        ({"rank": {"low": 1}}, "expected a list, {choices: [...]}"),
    ],
)
def test_a_wrong_entry_is_named(values, message):
    with pytest.raises(UserError) as caught:
        parse(values, "loreft", "--space space.yaml")
    assert message in str(caught.value) and "--space space.yaml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="which cannot be read .no such file."):
        read(tmp_path / "none.yaml", "loreft")


@pytest.mark.parametrize("text", ["rank", "rank=[4, 8"])
def test_a_flag_that_is_no_entry_is_refused(text):
    with pytest.raises(UserError, match="--vary: got"):
        parse_flags([text], "loreft")


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
