"""Compare ReFT and LoRA methods on a chat model and real tasks, with one tuning budget.

    python -m benchmarks.proof.chat_model --model FOLDER --data FOLDER --task piqa -- --epochs 3

``FOLDER/<task>/{train,test}.json`` are LLM-Adapters' files. The rows of a task are split once, by
:data:`SPLIT_SEED`, into training and test rows of the sizes in :data:`SIZES`. A row is trained on
only if its own text ends in its answer. Of the training rows, each run holds out the part
:data:`HELD_OUT` by its seed (all trials have one seed) and trains on the others.

The frozen model is scored on the test rows without and with solved examples in the prompt.
``reft-train compare`` then gives every method the same number of trials to choose its learning rate
and rank by the held-out rows, and trains the best settings with each seed. The same command again
resumes: finished trials, runs and evaluations are kept.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reft_train import tasks
from reft_train.data.reading import read_rows
from reft_train.files import write_text
from reft_train.tasks.base import Example, Task

from benchmarks import machine
from benchmarks.proof.causal import command

SPLIT_SEED = 0
SHOTS = 3
SEEDS = (1, 2, 3)
METHODS = ("loreft", "nodireft", "lora", "dora")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# rows for training and test
SIZES = {"piqa": (350, 150), "SVAMP": (350, 150), "AQuA": (100, 94), "boolq": (700, 200)}
HELD_OUT = 0.15  # of the training rows
NEW_TOKENS = {"piqa": 12, "boolq": 12, "SVAMP": 128, "AQuA": 128}

Row = dict[str, Any]


def consistent(task: Task, example: Example) -> bool:
    """Return whether the text that a row teaches ends in its answer.

    For a letter this is the last one in parentheses: the task's rule reads the first capital letter
    A to E, which a worked solution often has in a word.
    """
    if example.answer in tuple("ABCDE"):
        return re.findall(r"\(([A-E])\)", example.target)[-1:] == [example.answer]
    return task.score(example.target, example).right


def split(folder: Path, task_name: str) -> tuple[list[Row], list[Row]]:
    """Split a task's rows into training and test rows.

    Test rows come from ``test.json``, training rows from ``train.json`` where it exists and else
    from the rest of ``test.json``. No instruction occurs in both.

    Raises:
        ValueError: If fewer rows remain than half of those in :data:`SIZES`.
    """
    task, shuffle = tasks.get(task_name), random.Random(SPLIT_SEED).shuffle

    def read(path: Path) -> dict[str, Any]:
        rows = read_rows(path, "--data")
        shuffle(rows)
        return {row.fields["instruction"]: row for row in rows}

    train_size, test_size = SIZES[task_name]
    rows = list(read(folder / "test.json").values())
    test, rest = rows[:test_size], rows[test_size:]
    if (folder / "train.json").is_file():
        tested = {row.fields["instruction"] for row in test}
        others = read(folder / "train.json")
        rest = [row for instruction, row in others.items() if instruction not in tested]
    train = [row for row in rest if consistent(task, task.example(row))][:train_size]
    for name, found, size in (("training", train, train_size), ("test", test, test_size)):
        if 2 * len(found) < size:
            what = f"{len(found)} {name} rows of {task_name} in {folder}"
            raise ValueError(f"--data: got {what}, expected {size}")
    return [dict(row.fields) for row in train], [dict(row.fields) for row in test]


def with_shots(row: Row, shots: list[Row]) -> Row:
    """Return the row with solved rows before its instruction."""
    solved = [f"{shot['instruction']}\n{shot['output'].strip()}\n\n" for shot in shots]
    return {**row, "instruction": "".join(solved) + row["instruction"]}


def named_label(text: str, labels: tuple[str, ...]) -> str | None:
    """Return the label that a text names first, or None."""
    found = [(text.lower().find(label), label) for label in labels if label in text.lower()]
    return min(found)[1] if found else None


def frozen_scores(folder: Path, task_name: str) -> dict[str, float]:
    """Return the accuracy by the task's rule, and that of the first label named, where it has any.

    The rule wants the trained wording, which the frozen model does not know; the second number
    needs the right label alone.
    """
    labels = getattr(tasks.get(task_name), "labels", None)
    text = (folder / "predictions" / f"{task_name}.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    scores = {"accuracy": statistics.fmean(bool(line["right"]) for line in lines)}
    if labels:
        scores["label_accuracy"] = statistics.fmean(
            named_label(line["generated"], tuple(labels)) == line["answer"] for line in lines
        )
    return scores


def frozen(task_name: str, model: Path, data: Path, out: Path, options: list[str]) -> dict:
    """Score the frozen model on ``data``'s test rows; an existing result is read again."""
    if not (out / "scores.json").is_file():
        words = ["eval", "--adapter", "none", "--task", task_name, "--model", model]
        subprocess.run(command(*words, "--data", data, "--out", out, *options), check=True)
    return frozen_scores(out, task_name)


def write_rows(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(rows))


def prove(
    task_name: str,
    model: Path,
    data: Path,
    out: Path,
    dtype: str,
    trials: int,
    options: Sequence[str],
) -> dict[str, Any]:
    """Run all steps of one task and return the results."""
    train, test = split(data / task_name, task_name)
    write_rows(out / "data" / task_name / "train.json", train)
    write_rows(out / "data" / task_name / "test.json", test)
    prompted = [with_shots(row, train[:SHOTS]) for row in test]
    write_rows(out / "few-shot-data" / task_name / "test.json", prompted)
    generation = ["--max-new-tokens", NEW_TOKENS[task_name], "--dtype", dtype]
    scores = {
        "frozen": frozen(task_name, model, out / "data", out / "frozen", generation),
        f"frozen, {SHOTS} examples in the prompt": frozen(
            task_name, model, out / "few-shot-data", out / "few-shot", generation
        ),
    }
    words = ["compare", "--task", task_name, "--model", model, "--data", out / "data"]
    words += ["--output", out / "compare", "--methods", *METHODS, "--seeds", *SEEDS]
    words += ["--budget-trials", trials, "--validation", HELD_OUT]
    words += ["--select", "loss", "--objective", "loss", "--batch-size", 8, "--accumulation", 1]
    words += ["--lora-targets", *LINEAR, *generation, *options]
    subprocess.run(command(*words), check=True)
    comparison = json.loads((out / "compare" / "compare.json").read_text(encoding="utf-8"))
    names = ("method", "seed", "tests", "validation", "steps", "seconds", "step_seconds")
    names += ("tokens_per_second", "trainable")
    return {
        "task": task_name,
        "rows": {"train": len(train), "held out of train": HELD_OUT, "test": len(test)},
        "split_seed": SPLIT_SEED,
        "frozen": scores,
        "methods": comparison["methods"],
        "runs": [{name: run[name] for name in names} for run in comparison["runs"]],
        "budget": comparison["budget"],
        "settings": comparison["config"] | {"model": model.name, "data": "data", "output": ""},
        "machine": machine.device_name("cpu"),
        "commit": machine.commit(),
        "versions": comparison["versions"],
    }


def main() -> None:
    """Run the command line and write ``<results>/<task>.json``."""
    parser = argparse.ArgumentParser(description="Compare methods on a chat model and real tasks.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the frozen model")
    parser.add_argument("--data", type=Path, required=True, help="folder with <task>/test.json")
    parser.add_argument("--task", choices=sorted(SIZES), required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/proof-chat-model"))
    parser.add_argument("--results", type=Path, help="folder of <task>.json (default: --out)")
    parser.add_argument("--budget-trials", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16", help="of the frozen weights")
    parser.add_argument("options", nargs="*", help="flags of reft-train compare, after --")
    parsed = parser.parse_args()
    where = parsed.out / parsed.task
    source = (parsed.task, parsed.model, parsed.data, where)
    result = prove(*source, parsed.dtype, parsed.budget_trials, parsed.options)
    text = json.dumps(result, indent=1) + "\n"
    write_text((parsed.results or parsed.out) / f"chat-model-{parsed.task}.json", text)
    for name, scores in result["frozen"].items():
        print(name, scores)
    for row in result["methods"]:
        print(row["method"], row["test"], row["trainable"])


if __name__ == "__main__":
    main()
