"""Whole runs of the command: what they leave, that every method trains, and that what is left is
what was trained.
"""

from __future__ import annotations

import json

import pytest
import torch
from reft_train import tasks
from reft_train.config import METHODS, build, read_yaml
from reft_train.methods import adapt, load_adapter
from reft_train.models import load
from reft_train.training.outcome import Outcome
from reft_train.training.run_dir import checkpoints
from safetensors.torch import load_file

from tests.reft_train.runs import adapter_bytes, boolq, instructions, logged, run, write_rows

KINDS = ("causal", "seq2seq", "classification")
FILES = (
    "config.yaml",
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "log.jsonl",
    "results.json",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_llama, tiny_t5, tiny_bert):
    """One finished run of each kind of model."""
    folder = tmp_path_factory.mktemp("finished")
    rows = write_rows(folder / "rows.jsonl", instructions(16))
    data = folder / "data" / "boolq"
    write_rows(data / "train.json", boolq(16))
    write_rows(data / "test.json", boolq(6))
    given = {
        "causal": (tiny_llama, {"train": rows, "test": [rows], "test_rows": 3}),
        "seq2seq": (tiny_t5, {"train": rows, "test": [rows], "test_rows": 3}),
        "classification": (tiny_bert, {"task": "boolq", "data": folder / "data"}),
    }
    outputs = {kind: folder / kind for kind in KINDS}
    codes = {
        kind: run(model, outputs[kind], **settings) for kind, (model, settings) in given.items()
    }
    assert codes == dict.fromkeys(KINDS, 0)
    return outputs


def trained_values(outcome: Outcome) -> int:
    return outcome.trainable + outcome.head


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_its_files_and_nothing_hidden(finished, kind):
    missing = [name for name in FILES if not (finished[kind] / name).is_file()]
    assert missing == [] and list((finished[kind] / "predictions").glob("*.jsonl"))
    assert [path.name for path in finished[kind].iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("kind", KINDS)
def test_results_hold_a_score_and_a_loss_for_each_step(finished, kind):
    outcome = Outcome.load(finished[kind])
    (metrics,) = outcome.tests.values()
    assert outcome.steps == 2 and [step for step, _ in outcome.losses] == [1, 2]
    assert set(metrics) <= {"exact_match", "accuracy"} and len(metrics) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_no_larger_than_its_parameters_and_64_kib(finished, kind):
    size = sum(path.stat().st_size for path in (finished[kind] / "adapter").rglob("*"))
    assert size <= 4 * trained_values(Outcome.load(finished[kind])) + 64 * 1024


@pytest.mark.parametrize("kind", KINDS)
def test_a_reloaded_adapter_gives_the_logits_of_the_last_checkpoint_bit_for_bit(finished, kind):
    config = build(read_yaml(finished[kind] / "config.yaml"))
    task = tasks.get(config.task)
    ids = torch.arange(10, 40).reshape(2, 15)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = ids
    found = []
    for folder in (finished[kind] / "adapter", checkpoints(finished[kind])[-1]):
        with torch.no_grad():
            found.append(load_adapter(load(config, task), folder).eval()(**inputs).logits)
    with torch.no_grad():
        bare = load(config, task).model.eval()(**inputs).logits
    assert torch.equal(*found) and not torch.equal(found[0], bare)


def test_predictions_are_scored_one_line_a_row(finished):
    lines = (
        (finished["classification"] / "predictions" / "boolq.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    rows = [json.loads(line) for line in lines]
    right = sum(row["prediction"] == row["answer"] for row in rows) / len(rows)
    assert len(rows) == 6 and Outcome.load(finished["classification"]).tests["boolq"] == {
        "accuracy": right
    }


# ---- methods

LACKING = {("causal", "head"), ("seq2seq", "head")}


def start_of(output) -> dict[str, torch.Tensor]:
    config = build(read_yaml(output / "config.yaml"))
    model = adapt(config, load(config, tasks.get(config.task)))
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_trains(kind, method, tmp_path, capsys, request):
    model = request.getfixturevalue(
        {"causal": "tiny_llama", "seq2seq": "tiny_t5", "classification": "tiny_bert"}[kind]
    )
    task, rows = ("boolq", boolq(8)) if kind == "classification" else ("jsonl", instructions(8))
    output = tmp_path / "run"
    settings = {
        "task": task,
        "method": method,
        "train": write_rows(tmp_path / "rows.json", rows),
        "max_steps": 3,
        "warmup": 0,
    }
    code = run(model, output, skip_test=True, **settings)
    if (kind, method) in LACKING:
        assert (
            code == 2
            and f"method: got {method!r}" in capsys.readouterr().err
            and not output.exists()
        )
        return
    assert code == 0
    outcome = Outcome.load(output)
    assert len(outcome.losses) == 3 and all(
        loss == loss and abs(loss) < float("inf") for _, loss in outcome.losses
    )
    saved, first = load_file(output / "adapter" / "adapter_model.safetensors"), start_of(output)
    assert first.keys() and sum(v.numel() for v in saved.values()) >= sum(
        v.numel() for v in first.values()
    )
    assert trained_values(outcome) == sum(value.numel() for value in first.values())
    moved = {
        name.replace(".default", "").replace(".modules_to_save", ""): value
        for name, value in first.items()
    }
    same = [
        name
        for name, value in saved.items()
        if name in moved and torch.equal(moved[name].cpu(), value)
    ]
    assert same == []


# ---- batches


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", instructions(24))


def losses(model, output, **settings) -> list[float]:
    assert run(model, output, skip_test=True, **settings) == 0
    return [loss for _, loss in logged(output)]


def test_packing_gives_the_losses_of_padding(tiny_llama, tmp_path, rows):
    padded = losses(tiny_llama, tmp_path / "padded", train=rows, epochs=2)
    packed = losses(tiny_llama, tmp_path / "packed", train=rows, epochs=2, packing=True)
    assert len(padded) == 6
    torch.testing.assert_close(torch.tensor(packed), torch.tensor(padded))


def test_packing_changes_the_batches(tiny_llama, tmp_path, rows, monkeypatch):
    from reft_train.data.collating import PackingCollator

    shapes = []
    packed = PackingCollator.__call__

    def noted(self, items):
        batch = packed(self, items)
        shapes.append((len(items), batch["input_ids"].shape[0]))
        return batch

    monkeypatch.setattr(PackingCollator, "__call__", noted)
    losses(
        tiny_llama, tmp_path / "packed", train=rows, packing=True, packed_length=128, batch_size=8
    )
    assert any(made < given for given, made in shapes)


def test_lengths_are_grouped_unless_it_is_turned_off(tiny_llama, tmp_path, rows):
    grouped = losses(tiny_llama, tmp_path / "grouped", train=rows)
    shuffled = losses(tiny_llama, tmp_path / "shuffled", train=rows, group_by_length=False)
    assert len(grouped) == len(shuffled) and grouped != shuffled


def test_a_stream_goes_on_over_the_end_of_its_file(tiny_llama, tmp_path, rows):
    # 24 rows are three steps of eight
    found = losses(
        tiny_llama, tmp_path / "run", train=rows, streaming=True, max_steps=7, shuffle_buffer=5
    )
    assert len(found) == 7 and Outcome.load(tmp_path / "run").steps == 7


def test_a_stream_without_shuffling_learns_what_the_file_in_its_order_teaches(
    tiny_llama, tmp_path, rows, monkeypatch
):
    from reft_train.data.sampling import ShuffledSampler

    streamed = losses(
        tiny_llama, tmp_path / "stream", train=rows, streaming=True, max_steps=3, shuffle_buffer=1
    )
    monkeypatch.setattr(ShuffledSampler, "__iter__", lambda self: iter(range(self.count)))
    read = losses(tiny_llama, tmp_path / "read", train=rows, max_steps=3, group_by_length=False)
    assert streamed == read


# ---- selection and optimizer


@pytest.mark.parametrize("select", ["loss", "metric"])
def test_the_best_checkpoint_is_published_bit_for_bit(
    select, tiny_llama, tmp_path, rows, monkeypatch
):
    from reft_train.tasks.base import Scored
    from reft_train.tasks.jsonl import Jsonl

    # a metric that changes from step to step, whatever the model says
    monkeypatch.setattr(
        Jsonl,
        "score",
        lambda self, text, example: Scored(text, hash(text + example.prompt) % 3 == 0),
    )
    output = tmp_path / "run"
    settings = {
        "validation": 8,
        "evaluate_every": 1,
        "keep": 1,
        "max_steps": 5,
        "lr": 0.3,
        "warmup": 0,
        "schedule": "constant",
    }
    assert run(tiny_llama, output, train=rows, select=select, skip_test=True, **settings) == 0
    name, better = ("eval_loss", min) if select == "loss" else ("eval_exact_match", max)
    scored = logged(output, name)
    best = next(step for step, value in scored if value == better(value for _, value in scored))
    assert len(scored) == 5
    assert adapter_bytes(output / "adapter") == adapter_bytes(output / f"checkpoint-{best}")
    assert Outcome.load(output).validation[name.removeprefix("eval_")] == dict(scored)[best]
    assert [path.name for path in checkpoints(output)] == sorted(
        {f"checkpoint-{best}", "checkpoint-5"}
    )


def test_without_selection_the_last_step_is_published(tiny_llama, tmp_path, rows):
    assert (
        run(tiny_llama, tmp_path / "run", train=rows, epochs=2, save_every=2, skip_test=True) == 0
    )
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-6"]
    assert adapter_bytes(tmp_path / "run" / "adapter") == adapter_bytes(
        tmp_path / "run" / "checkpoint-6"
    )


def head_and_rest(output) -> tuple[dict, dict]:
    saved = load_file(output / "adapter" / "adapter_model.safetensors")
    head = {name: value for name, value in saved.items() if "classifier" in name}
    return head, {name: value for name, value in saved.items() if name not in head}


def test_a_head_has_a_learning_rate_of_its_own(tiny_bert, tmp_path):
    train = write_rows(tmp_path / "rows.json", boolq(16))
    settings = {"task": "boolq", "train": train, "max_steps": 1, "warmup": 0, "skip_test": True}
    outputs = {lr: tmp_path / str(lr) for lr in (0.0, 0.01, 0.1)}
    for lr, output in outputs.items():
        assert run(tiny_bert, output, head_lr=lr, **settings) == 0
    heads, edits = zip(*(head_and_rest(output) for output in outputs.values()), strict=True)
    still, slow, fast = heads
    assert all(
        not torch.equal(slow[name], fast[name]) and not torch.equal(still[name], slow[name])
        for name in still
    )
    assert all(torch.equal(edits[0][name], other[name]) for other in edits[1:] for name in edits[0])


def test_weight_decay_keeps_r_orthonormal(tiny_llama, tmp_path, rows):
    output = tmp_path / "run"
    assert (
        run(tiny_llama, output, train=rows, epochs=4, weight_decay=10.0, lr=0.05, skip_test=True)
        == 0
    )
    # Householder products in float32: rounding grows as rank x eps, with room for sqrt(hidden) sums
    bound = 2 * 32**0.5 * torch.finfo(torch.float32).eps
    assert all(error <= bound for _, error in logged(output, "orthonormality"))
    plain = tmp_path / "plain"
    assert run(tiny_llama, plain, train=rows, epochs=4, lr=0.05, skip_test=True) == 0
    assert adapter_bytes(output / "adapter") != adapter_bytes(plain / "adapter")


# ---- splits


def kept_rows(config):
    from reft_train.training.prepare import find_rows

    found = find_rows(config, tasks.get(config.task))
    return found.train, found.held_out, found.tests


@pytest.mark.parametrize("validation, count", [(0.25, 6), (5, 5)])
def test_held_out_rows_are_never_trained_on(validation, count, rows):
    config = build({"model": "any", "task": "jsonl", "train": str(rows), "validation": validation})
    train, held_out, _ = kept_rows(config)
    texts = [[row.fields["instruction"] for row in part] for part in (train, held_out)]
    assert len(held_out) == count and len(train) == 24 - count
    assert set(texts[0]).isdisjoint(texts[1]) and len(set(texts[0] + texts[1])) == 24
    again = kept_rows(config)
    assert again[1] == held_out
    assert kept_rows(config.replace(seed=1))[1] != held_out


def test_glue_chooses_by_one_part_of_validation_and_reports_the_other(tiny_bert, tmp_path):
    sentences = [{"sentence": f"apples {i}", "label": i % 2, "idx": i} for i in range(20)]
    write_rows(tmp_path / "data" / "sst2" / "train.jsonl", sentences[:10])
    write_rows(tmp_path / "data" / "sst2" / "validation.jsonl", sentences[10:])
    output = tmp_path / "run"
    settings = {"task": "glue/sst2", "data": tmp_path / "data", "positions": "f1", "epochs": 2}
    assert run(tiny_bert, output, **settings) == 0
    lines = (output / "predictions" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    config = build(read_yaml(output / "config.yaml"))
    train, held_out, tests = kept_rows(config)
    reported = {json.loads(line)["idx"] for line in lines}
    assert config.select == "metric" and len(logged(output, "eval_accuracy")) == 2
    assert {row.fields["idx"] for row in train} == set(range(10))
    assert reported == {row.fields["idx"] for row in tests["validation"]} and len(reported) == 5
    assert {row.fields["idx"] for row in held_out} | reported == set(range(10, 20))
