"""Settings: recipes, what wins over what, YAML, and refusals of one line that name field, value
and expectation.
"""

from __future__ import annotations

import dataclasses

import pytest
from reft_train import tasks
from reft_train.config import FIELDS, RunConfig, build, dump_yaml, read_yaml
from reft_train.errors import UserError
from reft_train.recipes import RECIPES, recipe

LEAST = {"model": "a-model", "task": "jsonl"}


def yaml_file(tmp_path, text: str):
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ---- recipes


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_and_holds_its_values(name):
    task = name if name in tasks.names() else "glue/sst2" if "select" in RECIPES[name] else "jsonl"
    config = build({"model": "a-model", "task": task, "recipe": name})
    assert {field: getattr(config, field) for field in RECIPES[name]} == dict(RECIPES[name])
    assert config.recipe == name


@pytest.mark.parametrize("name", tasks.names())
def test_a_task_builds_with_its_own_recipe(name):
    config = build({"model": "a-model", "task": name})
    assert config.recipe == tasks.get(name).recipe and config.lr == RECIPES[config.recipe]["lr"]


def test_the_papers_commonsense_settings():
    config = build({"model": "a-model", "task": "commonsense"})
    assert (config.layers, config.rank, config.positions, config.share_weights) == (
        "all",
        8,
        "f7+l7",
        True,
    )
    assert (config.lr, config.epochs, config.batch_size * config.accumulation, config.warmup) == (
        9e-4,
        6,
        32,
        0.1,
    )
    assert build({"model": "a-model", "task": "math"}).epochs == 12


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(
        UserError, match="recipe: got 'comonsense', expected one of commonsense, math"
    ):
        recipe("comonsense")
    with pytest.raises(UserError, match="recipe: got 'none'"):
        build({**LEAST, "recipe": "none"})


# ---- precedence


def test_later_settings_win_over_earlier_ones_over_the_recipe_over_defaults(tmp_path):
    file = read_yaml(yaml_file(tmp_path, "model: m\ntask: commonsense\nlr: 0.1\nrank: 2\n"))
    config = build(file, {"rank": 3})
    assert config.rank == 3  # flag over file (2), recipe (8)
    assert config.lr == 0.1  # file over recipe (9e-4)
    assert config.epochs == 6 and FIELDS["epochs"].default == 3  # recipe over default
    assert config.keep == FIELDS["keep"].default


def test_a_recipe_that_is_asked_for_wins_over_the_tasks():
    assert build({**LEAST, "task": "commonsense", "recipe": "script"}).lr == 5e-3


# ---- YAML


@pytest.mark.parametrize("task", ["commonsense", "instruct", "glue/stsb", "jsonl"])
def test_settings_survive_yaml(task, tmp_path):
    config = build(
        {
            "model": "größe: 1",
            "task": task,
            "head_lr": 1e-05,
            "test": ["a b.json", "c.json"],
            "lora_alpha": 3,
        }
    )
    assert build(read_yaml(yaml_file(tmp_path, dump_yaml(config)))) == config


def test_every_field_survives_yaml_away_from_its_default(tmp_path):
    other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v / 2 + 0.125}
    values = {}
    for name, field in FIELDS.items():
        default = field.default
        if type(default) in other and name not in (
            "resume",
            "overwrite",
            "streaming",
            "fsdp",
            "share_weights",
        ):
            values[name] = other[type(default)](default)
    config = build(
        {**LEAST, **values, "positions": "f3+l2", "share_weights": False, "layers": [1, 3]}
    )
    assert build(read_yaml(yaml_file(tmp_path, dump_yaml(config)))) == config
    assert all(getattr(config, name) != FIELDS[name].default for name in values)


def test_a_learning_rate_without_a_point_is_a_number(tmp_path):
    file = read_yaml(yaml_file(tmp_path, "lr: 9e-4\n"))
    assert file["lr"] == "9e-4" and build(file, LEAST).lr == 9e-4


def test_a_copy_with_other_values_is_checked_again():
    config = build(LEAST)
    assert config.replace(rank=2).rank == 2 and config.rank == 8
    with pytest.raises(UserError, match="rank: got 0"):
        config.replace(rank=0)
    with pytest.raises(UserError, match="did you mean rank"):
        config.replace(rnak=2)


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        build(LEAST).rank = 3


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("- a\n- b\n", "with a list, expected a mapping of settings"),
        ("", "with a NoneType, expected a mapping of settings"),
        ("a: [1\n", "is not YAML"),
        ("learning_rate: 1\n", "'learning_rate', which is none"),
        ("1: 2\n", "got 1, which is none"),
    ],
)
def test_a_file_that_is_no_mapping_of_settings_is_refused(text, complaint, tmp_path):
    with pytest.raises(UserError) as error:
        read_yaml(yaml_file(tmp_path, text))
    assert (
        complaint in str(error.value)
        and "settings.yaml" in str(error.value)
        and "\n" not in str(error.value)
    )


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(
        UserError, match="--config: got .*nothing.yaml, which cannot be read .no such file."
    ):
        read_yaml(tmp_path / "nothing.yaml")


# ---- wrong values

WRONG = [
    ({"rank": 0}, "rank: got 0, expected a number from 1 to 256"),
    ({"rank": 2.5}, "rank: got 2.5, expected a whole number"),
    ({"rank": True}, "rank: got True, expected a whole number"),
    ({"rank": "8"}, "rank: got '8', expected a whole number"),
    ({"epochs": None}, "epochs: got None, expected a whole number"),
    ({"lr": -1}, "lr: got -1.0, expected a number >= 0"),
    ({"lr": "fast"}, "lr: got 'fast', expected a number"),
    ({"lr": float("nan")}, "lr: got nan, expected a number >= 0"),
    ({"lr": float("inf")}, "lr: got inf, expected a number >= 0"),
    ({"lr": [1]}, "lr: got [1], expected a number"),
    ({"warmup": 1.5}, "warmup: got 1.5, expected a number from 0 to 1"),
    ({"seed": -1}, "seed: got -1, expected a number from 0 to"),
    ({"method": "lorefd"}, "method: got 'lorefd', expected one of loreft, direft"),
    ({"schedule": 3}, "schedule: got 3, expected text"),
    ({"packing": "yes"}, "packing: got 'yes', expected true or false"),
    ({"packing": 1}, "packing: got 1, expected true or false"),
    ({"layers": "some"}, "layers: got 'some', expected 'all' or a list of layer numbers"),
    ({"layers": ["0"]}, "layers: got ['0'], expected a list of numbers"),
    ({"layers": [True]}, "layers: got [True], expected a list of numbers"),
    ({"test": [1]}, "test: got [1], expected a list of names"),
    ({"test": "a.json"}, "test: got 'a.json', expected a list"),
    ({"model": 3}, "model: got 3, expected text"),
    ({"model": ""}, "model: got none, expected"),
    ({"task": ""}, "task: got none, expected"),
    ({"task": "comonsense"}, "task: got 'comonsense'"),
    ({"recipe": "nothing"}, "recipe: got 'nothing', expected one of"),
    ({"recipe": ["math"]}, "recipe: got ['math'], expected"),
    ({"positions": "f0"}, "positions"),
    ({"positions": "middle"}, "middle"),
    ({"activation": "warp"}, "warp"),
    ({"share_weights": False, "positions": "f3"}, "share_weights: got false with positions 'f3'"),
    ({"streaming": True}, "max_steps: got none with streaming"),
    ({"streaming": True, "max_steps": 5, "validation": 3}, "validation: got 3 with streaming"),
    ({"validation": 2.5}, "validation: got 2.5, expected a part below 1 or a whole number"),
    ({"select": "loss"}, "select: got 'loss' without validation"),
    ({"fsdp": True, "deepspeed": "zero.json"}, "fsdp: got true with deepspeed"),
    ({"resume": True, "overwrite": True}, "resume: got true with overwrite"),
    ({"rnak": 2}, "setting: got 'rnak', which is none; did you mean rank?"),
    (
        {"learnig_rate_of_all": 2},
        "'learnig_rate_of_all', which is none; reft-train run --help lists them",
    ),
]


@pytest.mark.parametrize("values, complaint", WRONG, ids=[str(values) for values, _ in WRONG])
def test_a_wrong_value_is_refused_in_one_line_that_names_it(values, complaint):
    with pytest.raises(UserError) as error:
        build({**LEAST, **values})
    assert complaint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if f.metadata.get("choices")])
def test_every_choice_is_taken_and_no_other(name):
    companions = {"select": {"validation": 2}, "quantization": {"device": "cuda"}}.get(name, {})
    for choice in FIELDS[name].metadata["choices"]:
        assert getattr(build({**LEAST, **companions, name: choice}), name) == choice
    with pytest.raises(UserError, match=f"{name}: got 'other', expected one of"):
        build({**LEAST, name: "other"})


@pytest.mark.parametrize(
    "name", [n for n, f in FIELDS.items() if f.metadata.get("low") is not None]
)
def test_a_number_below_its_lowest_is_refused(name):
    low = FIELDS[name].metadata["low"]
    with pytest.raises(
        UserError, match=f"^{name}: got .*, expected a number (>= {low:g}|from {low:g} to )"
    ):
        build({**LEAST, name: type(low)(low - 1)})


def test_every_field_tells_what_it_is():
    assert all(field.metadata["help"] for field in FIELDS.values())
    assert {field.name for field in dataclasses.fields(RunConfig)} == set(FIELDS)
