"""Whatever moment of a save a run dies in, its newest checkpoint is whole."""

from __future__ import annotations

import io
import os
import resource
import shutil
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from reft_train.errors import UserError
from reft_train.flags import settings as settings_of
from reft_train.training import run_dir, session
from transformers import TrainerCallback

from tests.reft_train.runs import command, instructions, run, write_rows

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
DIED, PASSED = 9, 7


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def die_at(count: int, folder: Path) -> None:
    """From now on this process counts what it does to files below ``folder``, and dies before
    its ``count``-th act.
    """
    left = count

    def act(half: Path | None = None) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            if half is not None:
                os.truncate(half, half.stat().st_size // 2)
            os._exit(DIED)

    def audit(event: str, arguments: tuple) -> None:
        if (
            event in EVENTS
            and isinstance(arguments[0], str | os.PathLike)
            and str(folder) in str(arguments[0])
        ):
            writes = event != "open" or (
                isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            )
            if writes:
                act()

    def halved(function: Callable, place: int) -> Callable:
        # these write from C++ and Rust, where no audit reaches: they die with half a file on the
        # disk
        def write(*arguments, **options):
            result = function(*arguments, **options)
            act(Path(arguments[place]))
            return result

        return write

    import peft.peft_model

    torch.save = halved(torch.save, 1)
    peft.peft_model.safe_save_file = halved(peft.peft_model.safe_save_file, 1)
    fsync = os.fsync
    os.fsync = lambda handle: (act(), fsync(handle))[1]
    sys.addaudithook(audit)


class Fork(TrainerCallback):
    """Before the save of ``step`` it forks children that go on into it and die there, one act
    later each, until one passes.
    """

    def __init__(self, step: int, output: Path) -> None:
        self.step, self.output = step, output
        self.child = False
        self.left: list[dict[str, bytes]] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step != self.step:
            return
        spare = self.output.with_name("spare")
        shutil.copytree(self.output, spare)
        status = DIED
        while status == DIED:
            process = os.fork()
            if process == 0:
                self.child = True
                die_at(len(self.left), self.output)
                return
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            found = run_dir.last(self.output)
            self.left.append({"name": found.name.encode(), **contents(found)})
            shutil.rmtree(self.output)
            shutil.copytree(spare, self.output)
        shutil.rmtree(spare)
        assert status == PASSED

    def on_save(self, args, state, control, **kwargs) -> None:
        if self.child:
            os._exit(PASSED)


def trained(arguments: list[str], *callbacks: TrainerCallback) -> None:
    from reft_train.__main__ import parser

    session.train(settings_of(parser().parse_args(arguments)), callbacks=callbacks)


@pytest.fixture
def arguments(tmp_path, tiny_llama) -> Callable[..., list[str]]:
    rows = write_rows(tmp_path / "rows.jsonl", instructions(24))

    def of(output: Path, **settings) -> list[str]:
        fixed = {
            "save_every": 1,
            "skip_test": True,
            "dropout": 0.1,
            "log_every": 50,
        }  # a log would wait for threads that no child has
        return command(tiny_llama, output, train=rows, **fixed, **settings)

    return of


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(keep, arguments, tmp_path):
    fork = Fork(2, tmp_path / "run")
    trained(arguments(tmp_path / "run", keep=keep), fork)
    names = [left.pop("name").decode() for left in fork.left]
    # the first child did nothing, the last one all
    expected = {"checkpoint-1": fork.left[0], "checkpoint-2": fork.left[-1]}
    assert len(names) > 20 and set(names) == set(expected) and names == sorted(names)
    for name, left in zip(names, fork.left, strict=True):
        assert left.keys() == expected[name].keys()
        # the numbers of Python's own generator, which each child finds further on, are in the
        # states of the generators
        assert [
            file for file in left if left[file] != expected[name][file] and file != "rng_state.pth"
        ] == []
        assert all(
            zipfile.ZipFile(io.BytesIO(left[file])).testzip() is None
            for file in left
            if file.endswith((".pt", ".pth"))
        )
    assert expected["checkpoint-1"].keys() == expected["checkpoint-2"].keys() > set(run_dir.NEEDED)


def test_what_a_killed_save_left_is_swept_and_the_run_goes_on(arguments, tmp_path):
    trained(arguments(tmp_path / "whole"))
    trained(arguments(tmp_path / "run", max_steps=3))
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    shutil.copytree(
        tmp_path / "run" / "checkpoint-2", tmp_path / "run" / ".saving" / "checkpoint-3"
    )
    (tmp_path / "run" / ".saving" / "checkpoint-3" / "optimizer.pt").write_bytes(b"half")
    trained(arguments(tmp_path / "run", max_steps=3, resume=True))
    assert [path.name for path in (tmp_path / "run").glob(".*")] == []
    expected, found = (contents(tmp_path / name / "checkpoint-3") for name in ("whole", "run"))
    differing = [name for name in expected if expected[name] != found[name]]
    assert found.keys() == expected.keys() and set(differing) <= {
        "trainer_state.json",
        "rng_state.pth",
    }


def checkpoint_of(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    for name in (*run_dir.NEEDED, "optimizer.pt"):
        (folder / name).write_text(f"{text} {name}")
    return folder


def test_a_kill_while_a_step_is_saved_a_second_time_leaves_every_file_there(tmp_path):
    status, count = DIED, 0
    while status == DIED:
        run_folder = tmp_path / str(count)
        target = checkpoint_of(run_folder / "checkpoint-4", "old")
        staged = checkpoint_of(run_folder / ".saving" / "checkpoint-4", "new")
        process = os.fork()
        if process == 0:
            die_at(count, run_folder)
            run_dir.publish(staged, target)
            os._exit(PASSED)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert run_dir.last(run_folder) == target
        found = {name: value.decode() for name, value in contents(target).items()}
        assert all(value in (f"old {name}", f"new {name}") for name, value in found.items())
        assert len(found) == len(run_dir.NEEDED) + 1
        count += 1
    assert status == PASSED and count > 10
    assert (
        all(value.startswith("new") for value in found.values())
        and not (run_folder / ".saving").exists()
    )


class Full(TrainerCallback):
    """From a step on, no file of this process may grow beyond so many bytes."""

    def __init__(self, step: int, limit: int) -> None:
        self.step, self.limit = step, limit

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))


@pytest.mark.parametrize("limit", [700, 2500, 4000])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    limit, tiny_llama, tmp_path, monkeypatch, capfd
):
    rows = write_rows(tmp_path / "rows.jsonl", instructions(24))
    monkeypatch.setattr(session, "train", partial(session.train, callbacks=[Full(2, limit)]))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        code = run(
            tiny_llama, tmp_path / "run", train=rows, save_every=1, skip_test=True, log_every=100
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines = capfd.readouterr().err.rstrip("\n").splitlines()
    assert code == 2
    assert lines[-1].startswith(
        f"reft_train run: error: output: got {tmp_path / 'run'}, where no checkpoint can be written"
    )
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1"]
    assert list((tmp_path / "run").glob(".*")) == [] and run_dir.last(tmp_path / "run") is not None


# ---- finding and thinning out


def test_checkpoints_are_ordered_by_number_and_nothing_else_is_taken_for_one(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", "adapter", ".saving"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    assert [path.name for path in run_dir.checkpoints(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-10",
    ]
    assert (
        run_dir.checkpoints(tmp_path / "nothing") == []
        and run_dir.last(tmp_path / "nothing") is None
    )


def test_a_checkpoint_that_lacks_a_file_is_refused(tmp_path):
    (checkpoint_of(tmp_path / "checkpoint-3", "a") / "scheduler.pt").unlink()
    with pytest.raises(
        UserError, match="checkpoint-3 without scheduler.pt, expected a complete checkpoint"
    ):
        run_dir.last(tmp_path)


@pytest.mark.parametrize("best, left", [(None, [3, 4]), (1, [1, 3, 4]), (4, [3, 4])])
def test_the_newest_and_the_best_checkpoint_stay(best, left, tmp_path):
    for step in range(1, 5):
        (tmp_path / f"checkpoint-{step}").mkdir()
    run_dir.rotate(tmp_path, 2, None if best is None else str(tmp_path / f"checkpoint-{best}"))
    assert [int(path.name.rpartition("-")[2]) for path in run_dir.checkpoints(tmp_path)] == left
