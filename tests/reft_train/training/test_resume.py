"""A run that is interrupted or killed and resumed is the run that was not: the same losses, the
same adapter bit for bit.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
from reft_train.__main__ import main, parser
from reft_train.config import dump_yaml, read_yaml
from reft_train.flags import settings as settings_of
from reft_train.training.outcome import Outcome
from reft_train.training.run_dir import checkpoints, resume_hint
from reft_train.training.session import train
from transformers import TrainerCallback

from tests.reft_train.runs import (
    adapter_bytes,
    boolq,
    command,
    in_process,
    instructions,
    logged,
    run,
    write_rows,
)


class Killed(BaseException):
    """Ends a run as SIGKILL does: what is on the disk is all that is left."""


class At(TrainerCallback):
    """Acts at the end of an optimizer step, after all that the run does there but saving."""

    def __init__(self, step: int, act) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            self.act()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def kill() -> None:
    raise Killed


def trained(arguments: list[str], *callbacks: TrainerCallback) -> Outcome | None:
    try:
        return train(settings_of(parser().parse_args(arguments)), callbacks=callbacks)
    except Killed:
        return None


@pytest.fixture(scope="module")
def dropping(tmp_path_factory, tiny_llama, tiny_bert):
    """The tiny models with dropout of their own."""
    folders = {}
    for kind, model in {"causal": tiny_llama, "encoder": tiny_bert}.items():
        folders[kind] = Path(shutil.copytree(model, tmp_path_factory.mktemp("dropping") / kind))
        path = folders[kind] / "config.json"
        rates = dict.fromkeys(
            ("attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.1
        )
        path.write_text(
            json.dumps(json.loads(path.read_text(encoding="utf-8")) | rates), encoding="utf-8"
        )
    return folders


# 22 rows: six micro-batches of four, the last one short, three steps an epoch
CASES = {
    "packed": ("causal", {"epochs": 3, "packing": True, "save_every": 2}),
    "uneven": (
        "causal",
        {
            "epochs": 3,
            "batch_size": 3,
            "accumulation": 3,
            "save_every": 2,
            "group_by_length": False,
        },
    ),
    "streamed": (
        "causal",
        {"max_steps": 9, "streaming": True, "shuffle_buffer": 6, "save_every": 2},
    ),
    "encoder": ("encoder", {"epochs": 3, "task": "boolq", "save_every": 2}),
    "epochs": ("encoder", {"epochs": 3, "task": "boolq"}),
    "selected": ("encoder", {"epochs": 4, "task": "boolq", "validation": 6, "select": "metric"}),
}


@pytest.fixture(scope="module")
def case(request, dropping, tmp_path_factory):
    """A way to run one case: its arguments for an output folder, and the folder of its
    uninterrupted run.
    """
    kind, settings = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    rows = write_rows(folder / "rows.jsonl", boolq(22) if kind == "encoder" else instructions(22))

    def arguments(output: Path, **more) -> list[str]:
        fixed = {
            "train": rows,
            "dropout": 0.1,
            "skip_test": True,
            "log_every": 4,
            "cache": folder / "cache",
        }
        return command(dropping[kind], output, **fixed, **settings, **more)

    assert trained(arguments(folder / "whole")) is not None
    return arguments, folder / "whole"


def same_run(output: Path, whole: Path) -> None:
    assert logged(output) == logged(whole)
    assert logged(output, "eval_loss") == logged(whole, "eval_loss")
    assert Outcome.load(output).losses == Outcome.load(whole).losses
    assert adapter_bytes(output / "adapter") == adapter_bytes(whole / "adapter")
    assert [path.name for path in checkpoints(output)][-1] == [
        path.name for path in checkpoints(whole)
    ][-1]


@pytest.mark.parametrize("case", CASES, indirect=True)
@pytest.mark.parametrize(
    "step", [3, 5]
)  # the end of an epoch, and within one and between two lines of the log
def test_an_interrupted_run_goes_on_exactly(case, step, tmp_path):
    arguments, whole = case
    stopped = trained(arguments(tmp_path / "run"), At(step, interrupt))
    assert stopped.interrupted and stopped.steps in (step, step + 1)
    assert trained(arguments(tmp_path / "run", resume=True)).steps == Outcome.load(whole).steps
    same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_a_killed_run_goes_on_exactly(case, tmp_path):
    arguments, whole = case
    assert trained(arguments(tmp_path / "run"), At(5, kill)) is None
    assert checkpoints(tmp_path / "run") and not (tmp_path / "run" / "results.json").exists()
    assert trained(arguments(tmp_path / "run", resume=True)).steps == Outcome.load(whole).steps
    same_run(tmp_path / "run", whole)


def test_a_finished_run_that_is_resumed_stays_as_it_is(tiny_llama, tmp_path):
    settings = {"train": write_rows(tmp_path / "rows.jsonl", instructions(16)), "skip_test": True}
    assert run(tiny_llama, tmp_path / "run", **settings) == 0
    before = adapter_bytes(tmp_path / "run" / "adapter"), logged(tmp_path / "run")
    assert run(tiny_llama, tmp_path / "run", **settings, resume=True) == 0
    assert (adapter_bytes(tmp_path / "run" / "adapter"), logged(tmp_path / "run")) == before


# ---- in processes of their own


def wait_for(condition, process, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.01)


@pytest.mark.slow  # three processes, and a model loaded in each
def test_signals_end_a_process_and_its_command_goes_on_exactly(dropping, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", instructions(22))
    settings = {
        "train": rows,
        "dropout": 0.1,
        "skip_test": True,
        "max_steps": 60,
        "save_every": 10,
        "threads": 1,
        "log_every": 7,
    }
    outputs = {name: tmp_path / f"the {name} run" for name in ("interrupted", "killed")}
    processes = {
        name: in_process(command(dropping["causal"], output, **settings))
        for name, output in outputs.items()
    }
    try:
        wait_for(lambda: checkpoints(outputs["interrupted"]), processes["interrupted"])
        processes["interrupted"].send_signal(signal.SIGINT)
        wait_for(lambda: checkpoints(outputs["killed"]), processes["killed"])
        processes["killed"].kill()
        texts = {name: process.communicate(timeout=240)[1] for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
    assert (
        processes["interrupted"].returncode == 130
        and processes["killed"].returncode == -signal.SIGKILL
    )
    words = {
        "interrupted": shlex.split(
            texts["interrupted"].splitlines()[-1].partition("to resume: ")[2]
        ),
        "killed": [
            "reft-train",
            *command(dropping["causal"], outputs["killed"], **settings),
            "--resume",
        ],
    }
    assert words["interrupted"][0] == "reft-train"
    whole = tmp_path / "whole"
    assert run(dropping["causal"], whole, **settings) == 0
    for name, output in outputs.items():
        assert main(words[name][1:]) == 0, capsys.readouterr().err
        same_run(output, whole)


# ---- what is refused


@pytest.fixture(scope="module")
def begun(tmp_path_factory, tiny_llama):
    """The settings of a run that was stopped at its second step."""
    folder = tmp_path_factory.mktemp("begun")
    settings = {
        "train": write_rows(folder / "rows.jsonl", instructions(16)),
        "epochs": 4,
        "skip_test": True,
    }
    assert trained(command(tiny_llama, folder / "run", **settings), At(2, interrupt)).interrupted
    return folder / "run", settings


CHANGES = {
    "lr": 0.02,
    "rank": 3,
    "method": "direft",
    "batch_size": 2,
    "accumulation": 1,
    "seed": 1,
    "epochs": 5,
    "dropout": 0.1,
    "max_length": 32,
    "packing": True,
    "positions": "f1",
    "validation": 2.0,
    "train_rows": 9,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_is_refused_on_resuming(name, begun, tiny_llama, capsys):
    output, settings = begun
    before = sorted(output.rglob("*"))
    assert run(tiny_llama, output, **{**settings, name: CHANGES[name]}, resume=True) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"resume: got {name} {CHANGES[name]!r}, but the run was started with" in line
    assert sorted(output.rglob("*")) == before


def test_other_data_is_refused_on_resuming(begun, tiny_llama, capsys, tmp_path):
    output, settings = begun
    other = write_rows(tmp_path / "other.jsonl", instructions(17)[1:])
    assert run(tiny_llama, output, **{**settings, "train": other}, resume=True) == 2
    assert "resume: the training rows differ from those" in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_that_holds_a_run_is_refused(begun, tiny_llama, capsys):
    output, settings = begun
    assert run(tiny_llama, output, **settings) == 2
    assert (
        "which contains a run, expected another folder, --resume or --overwrite"
        in capsys.readouterr().err.splitlines()[-1]
    )


def test_there_must_be_something_to_resume(tiny_llama, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", instructions(8))
    assert run(tiny_llama, tmp_path / "run", train=rows, resume=True) == 2
    assert "which has no checkpoint" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_overwriting_starts_clean(begun, tiny_llama, tmp_path):
    output, settings = begun
    used = Path(shutil.copytree(output, tmp_path / "used"))
    write_rows(used / "predictions" / "old.jsonl", [{"old": 1}])
    (used / ".saving").mkdir()
    assert run(tiny_llama, used, **{**settings, "epochs": 1}, overwrite=True) == 0
    assert run(tiny_llama, tmp_path / "fresh", **{**settings, "epochs": 1}) == 0
    assert sorted(path.name for path in used.iterdir()) == sorted(
        path.name for path in (tmp_path / "fresh").iterdir()
    )
    assert logged(used) == logged(tmp_path / "fresh")
    assert adapter_bytes(used / "adapter") == adapter_bytes(tmp_path / "fresh" / "adapter")


def test_the_hint_is_a_command_for_any_folder_name(begun):
    output, _ = begun
    config = settings_of(
        parser().parse_args(
            ["run", "--config", str(output / "config.yaml"), "--output", "a b/it's"]
        )
    )
    assert shlex.split(resume_hint(config)) == [
        "reft-train",
        "run",
        "--config",
        "a b/it's/config.yaml",
        "--resume",
    ]


def test_the_settings_that_are_kept_ask_neither_to_resume_nor_to_overwrite(begun):
    values = read_yaml(begun[0] / "config.yaml")
    assert (
        values["resume"] is False
        and values["overwrite"] is False
        and values["output"] == str(begun[0])
    )
    assert dump_yaml(
        settings_of(parser().parse_args(["run", "--config", str(begun[0] / "config.yaml")]))
    )
