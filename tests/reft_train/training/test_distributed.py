"""Two processes on gloo train what one process trains, under DDP and FSDP2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reft_train.config import build
from reft_train.training.outcome import Outcome
from reft_train.training.session import train
from safetensors.torch import load_file

from tests.reft_train.training.launching import (
    column,
    launch,
    prompts,
    sentences,
    settings,
    write_rows,
)

pytestmark = pytest.mark.slow
ENGINES = ("ddp", "fsdp")
CASES = {
    "tied": {"packing": True, "skip_test": False, "weight_decay": 0.1},
    "untied": {"share_weights": False, "gradient_checkpointing": True, "select": "loss"},
    "free": {"method": "nodireft", "gradient_checkpointing": True},
    "classes": {
        "task": "glue/sst2",
        "head_lr": 1e-2,
        "select": "metric",
        "dropout": 0.0,
        "warmup": 0.0,
    },
}
INTERRUPTED = 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_llama, tiny_bert) -> Path:
    """A folder of runs ``ENGINE-CASE``: "one" process, "ddp" and "fsdp" of two, and of these
    ``-resumed`` ones.
    """
    folder = tmp_path_factory.mktemp("distributed")
    write_rows(folder / "sst2/train.jsonl", sentences(24))
    write_rows(folder / "sst2/validation.jsonl", sentences(12))

    def case(name: str, engine: str, **changes) -> dict:
        made = settings(folder, tiny_llama, output=str(folder / f"{engine}-{name}"), **CASES[name])
        if name == "classes":
            made.update(model=str(tiny_bert), train=None, test=[], data=str(folder), validation=0)
        return {**made, "fsdp": engine == "fsdp", **changes}

    for name in CASES:
        train(build(case(name, "one", batch_size=4)))
    several = [case(name, engine) for engine in ENGINES for name in CASES]
    for engine in ENGINES:
        output = str(folder / f"{engine}-resumed")
        several += [case("untied", engine, output=output, interrupt_at=INTERRUPTED)]
        several += [case("untied", engine, output=output, resume=True)]
        several += [
            case(
                "tied",
                engine,
                output=str(folder / f"{engine}-bf16"),
                mixed_precision="bf16",
                epochs=1,
            )
        ]
    (folder / "several.json").write_text(json.dumps(several))
    done = launch([str(Path(__file__).parent / "several_runs.py"), str(folder / "several.json")])
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def _adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter/adapter_model.safetensors")


def _same_column(one: Path, two: Path, name: str) -> None:
    first, second = column(one, name), column(two, name)
    assert first and [step for step, _ in first] == [step for step, _ in second]
    got, want = (torch.tensor([value for _, value in pairs]) for pairs in (second, first))
    # Sums in another order differ by roundings. Adam divides by the size of each gradient, so that
    # a rounding of a small one grows from step to step: each step may add what the first one has.
    steps = torch.arange(1, len(want) + 1)
    close = torch.finfo(torch.float32).eps
    allowed = 10 * close * (want.abs() + 1) * steps**2
    assert ((got - want).abs() <= allowed).all(), (got, want)


@pytest.mark.parametrize("quantity", ["loss", "grad_norm", "eval_loss", "learning_rate"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_log_what_one_process_logs(runs, engine, case, quantity):
    _same_column(runs / f"one-{case}", runs / f"{engine}-{case}", quantity)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_save_the_adapter_of_one(runs, engine, case):
    one, two = _adapter(runs / f"one-{case}"), _adapter(runs / f"{engine}-{case}")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("engine", ENGINES)
def test_training_moves_the_adapter(runs, engine):
    losses = [loss for _, loss in column(runs / f"{engine}-tied", "loss")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_answer_what_one_process_answers(runs, engine):
    one, two = (runs / f"{name}-tied/predictions/test.jsonl" for name in ("one", engine))
    assert one.read_text() == two.read_text()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(runs, engine):
    whole, resumed = runs / f"{engine}-untied", runs / f"{engine}-resumed"
    assert (resumed / f"checkpoint-{INTERRUPTED}").is_dir()
    for quantity in ("loss", "eval_loss", "grad_norm"):
        assert column(resumed, quantity) == column(whole, quantity)
    one, two = _adapter(whole), _adapter(resumed)
    assert all(torch.equal(one[name], two[name]) for name in one.keys() | two.keys())


@pytest.mark.parametrize("engine", ENGINES)
def test_the_adapter_of_the_best_checkpoint_is_kept(runs, engine):
    run = runs / f"{engine}-untied"
    step, _ = min(column(run, "eval_loss"), key=lambda pair: pair[1])
    best = load_file(run / f"checkpoint-{step}/adapter_model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in _adapter(run).items())


@pytest.mark.parametrize("engine", ENGINES)
def test_checkpoints_hold_no_frozen_weights(runs, engine, tiny_llama):
    frozen = (tiny_llama / "model.safetensors").stat().st_size
    checkpoint = runs / f"{engine}-tied/checkpoint-2"
    weights = [f for f in checkpoint.iterdir() if not f.name.startswith("rng_state")]
    assert sum(f.stat().st_size for f in weights) < frozen


@pytest.mark.parametrize("engine", ENGINES)
def test_edits_stay_orthonormal_in_bf16(runs, engine):
    assert Outcome.load(runs / f"{engine}-bf16").orthonormality < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_two_bf16_processes_follow_the_float32_run(runs, engine):
    """To bf16's rounding, while the schedule is the same: in the first step, before anything is
    learned.
    """
    (_, plain), (_, rounded) = (
        column(runs / "one-tied", "loss")[0],
        column(runs / f"{engine}-bf16", "loss")[0],
    )
    assert rounded != plain and abs(rounded - plain) <= torch.finfo(torch.bfloat16).eps * plain


def test_fsdp_runs_were_sharded(runs):
    assert (runs / "fsdp-tied/checkpoint-2/pytorch_model_fsdp.bin").is_file()
    assert not (runs / "ddp-tied/checkpoint-2/pytorch_model_fsdp.bin").exists()


def _config(path: Path, **values) -> str:
    path.write_text(json.dumps(values))  # JSON is YAML
    return str(path)


def test_accelerate_launches_a_sharded_run(tmp_path, tiny_llama):
    """As ``accelerate launch --use_fsdp``; on CPUs accelerate starts several processes in no
    other way without MPI.
    """
    output = tmp_path / "run"
    config = _config(
        tmp_path / "run.yaml", **settings(tmp_path, tiny_llama, output=str(output), epochs=1)
    )
    launcher = (
        "accelerate.commands.launch",
        "--use_fsdp",
        "--fsdp_version",
        "2",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--main_process_port",
        "0",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    )
    done = launch(["-m", "reft_train", "run", "--config", config], launcher)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count(f"written: {output}") == 1
    assert (output / "results.json").is_file() and (
        output / "checkpoint-2/rng_state_1.pth"
    ).is_file()
    assert (output / "checkpoint-2/pytorch_model_fsdp.bin").is_file()


def test_bad_input_is_said_once_and_ends_every_process(tmp_path, tiny_llama):
    rows = write_rows(tmp_path / "bad.jsonl", [*prompts(3), {"prompt": "no completion"}])
    config = _config(
        tmp_path / "run.yaml",
        **settings(
            tmp_path, tiny_llama, output=str(tmp_path / "run"), train=str(rows), validation=0
        ),
    )
    done = launch(["-m", "reft_train", "run", "--config", config])
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("error: ") == 1 and "reft_train run: error: " in done.stderr
    assert "exitcode  : 2" in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()
