"""Settings: recipes, what wins over what, YAML, and refusals of one line that name field, value
and expectation.
"""

from __future__ import annotations

import typing

import pydantic
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
    task = name if name in tasks.TASKS else "glue/sst2" if "select" in RECIPES[name] else "jsonl"
    config = build({"model": "a-model", "task": task, "recipe": name})
    assert {field: getattr(config, field) for field in RECIPES[name]} == dict(RECIPES[name])
    assert config.recipe == name


@pytest.mark.parametrize("name", tasks.TASKS)
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
            "prefix_cache",  # not with packing and compile
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
    with pytest.raises(pydantic.ValidationError):
        build(LEAST).rank = 3


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("- a\n- b\n", "with a list, expected a mapping of settings"),
        ("", "with a NoneType, expected a mapping of settings"),
        ("a: [1\n", "which cannot be read"),
        ("learning_rate: 1\n", "unknown setting 'learning_rate'"),
        ("1: 2\n", "unknown setting 1"),
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
    ({"rank": 0}, "rank: got 0, expected greater than or equal to 1"),
    ({"rank": 257}, "rank: got 257, expected less than or equal to 256"),
    ({"rank": 2.5}, "rank: got 2.5, expected a valid integer"),
    ({"rank": "eight"}, "rank: got 'eight', expected a valid integer"),
    ({"epochs": None}, "epochs: got None, expected a valid integer"),
    ({"lr": -1}, "lr: got -1, expected greater than or equal to 0"),
    ({"lr": "fast"}, "lr: got 'fast', expected a valid number"),
    ({"lr": float("nan")}, "lr: got nan, expected a finite number"),
    ({"lr": float("inf")}, "lr: got inf, expected a finite number"),
    ({"lr": [1]}, "lr: got [1], expected a valid number"),
    ({"warmup": 1.5}, "warmup: got 1.5, expected less than or equal to 1"),
    ({"seed": -1}, "seed: got -1, expected greater than or equal to 0"),
    ({"method": "lorefd"}, "method: got 'lorefd', expected 'loreft', 'direft'"),
    ({"schedule": 3}, "schedule: got 3, expected 'linear'"),
    ({"packing": "perhaps"}, "packing: got 'perhaps', expected a valid boolean"),
    ({"layers": "some"}, "layers: got 'some', expected 'all' or layer numbers"),
    ({"layers": [0, 0]}, "layers: got [0, 0], expected 'all' or layer numbers"),
    ({"layers": [-1]}, "layers: got [-1], expected 'all' or layer numbers"),
    ({"test": [1]}, "test: got 1, expected a valid string"),
    ({"test": "a.json"}, "test: got 'a.json', expected a valid list"),
    ({"model": 3}, "model: got 3, expected a valid string"),
    ({"model": ""}, "model: got none, expected"),
    ({"task": ""}, "task: got none, expected"),
    ({"task": "comonsense"}, "task: got 'comonsense'"),
    ({"recipe": "nothing"}, "recipe: got 'nothing', expected one of"),
    ({"recipe": ["math"]}, "recipe: got "),
    ({"positions": "f0"}, "positions"),
    ({"positions": "middle"}, "middle"),
    ({"activation": "warp"}, "warp"),
    ({"share_weights": False, "positions": "f3"}, "share_weights: got false with positions 'f3'"),
    ({"streaming": True}, "max_steps: got none with streaming"),
    ({"streaming": True, "max_steps": 5, "validation": 3}, "validation: got 3 with streaming"),
    ({"validation": 2.5}, "validation: got 2.5, expected a part below 1 or a whole number"),
    ({"select": "loss"}, "select: got 'loss' alone, expected held-out training rows"),
    ({"fsdp": True, "deepspeed": "zero.json"}, "fsdp: got true with deepspeed"),
    ({"resume": True, "overwrite": True}, "resume: got true with overwrite"),
    ({"rnak": 2}, "unknown setting 'rnak'; did you mean rank?"),
    (
        {"learnig_rate_of_all": 2},
        "unknown setting 'learnig_rate_of_all'; reft-train run --help lists the settings",
    ),
]


@pytest.mark.parametrize("values, complaint", WRONG, ids=[str(values) for values, _ in WRONG])
def test_a_wrong_value_is_refused_in_one_line_that_names_it(values, complaint):
    with pytest.raises(UserError) as error:
        build({**LEAST, **values})
    assert complaint in str(error.value) and "\n" not in str(error.value)


CHOICES = {
    name: typing.get_args(field.annotation)
    for name, field in FIELDS.items()
    if typing.get_origin(field.annotation) is typing.Literal
}
LOWEST = {
    name: limit.ge
    for name, field in FIELDS.items()
    for limit in field.metadata
    if hasattr(limit, "ge")
}


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_taken_and_no_other(name):
    companions = {"select": {"validation": 2}, "quantization": {"device": "cuda"}}.get(name, {})
    for choice in CHOICES[name]:
        assert getattr(build({**LEAST, **companions, name: choice}), name) == choice
    with pytest.raises(UserError, match=f"{name}: got 'other', expected '"):
        build({**LEAST, name: "other"})


@pytest.mark.parametrize("name", LOWEST)
def test_a_number_below_its_lowest_is_refused(name):
    with pytest.raises(UserError, match=f"^{name}: got .*, expected greater than or equal to "):
        build({**LEAST, name: LOWEST[name] - 1})


def test_every_field_tells_what_it_is():
    assert all(field.description for field in FIELDS.values())
    assert set(RunConfig.model_fields) == set(FIELDS)
