"""Labelled texts, split into a part to train on and a part that is held out; loaders for a
user's own file.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from reft_train.errors import UserError

HELD_OUT_FRACTION = 0.25


@dataclass(frozen=True)
class Example:
    """One text, its label, and where it comes from ("" where a row has no source)."""

    text: str
    label: str
    source: str = ""


@dataclass(frozen=True)
class Dataset:
    """Examples to train on and held-out ones; ``labels`` in the order of the classifier's
    outputs.
    """

    train: list[Example]
    held_out: list[Example]
    labels: list[str]
    description: str

    @property
    def majority_accuracy(self) -> float:
        """Held-out accuracy of always answering the training part's most frequent label."""
        counts = Counter(example.label for example in self.train)
        majority = min(counts, key=lambda label: (-counts[label], label))
        return sum(example.label == majority for example in self.held_out) / len(self.held_out)

    def to_json(self) -> str:
        """For another process; see :meth:`from_json`."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Dataset:
        """The dataset that :meth:`to_json` wrote."""
        fields = json.loads(text)
        for part in ("train", "held_out"):
            fields[part] = [Example(**example) for example in fields[part]]
        return cls(**fields)


def normalized(text: str) -> str:
    """What two texts have in common when they count as the same: letter case and spacing do not
    matter.
    """
    return " ".join(text.split()).casefold()


def deduplicate(examples: list[Example]) -> list[Example]:
    """Keep a text's first occurrence; drop a text that occurs under two labels, since no answer
    to it is right.
    """
    labels: dict[str, set[str]] = {}
    for example in examples:
        labels.setdefault(normalized(example.text), set()).add(example.label)
    kept, seen = [], set()
    for example in examples:
        key = normalized(example.text)
        if len(labels[key]) == 1 and key not in seen:
            seen.add(key)
            kept.append(example)
    return kept


def split_by_row(
    examples: list[Example], seed: int, name: str = "--data"
) -> tuple[list[Example], list[Example]]:
    """A seeded split that holds out a quarter of each label's rows (at least one) and leaves at
    least one to train on.

    Raises:
        UserError: a label with a single row, which can be on one side only.
    """
    by_label: dict[str, list[Example]] = {}
    for example in examples:
        by_label.setdefault(example.label, []).append(example)
    train, held_out = [], []
    for label in sorted(by_label):
        rows = by_label[label]
        if len(rows) < 2:
            raise UserError(
                f"{name}: got one distinct text labelled {label!r}, expected at least 2 (one is "
                "held out)"
            )
        random.Random(f"{seed}/{label}").shuffle(rows)
        count = max(1, round(len(rows) * HELD_OUT_FRACTION))
        held_out += rows[:count]
        train += rows[count:]
    return train, held_out


def _text(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""


def _answer(value: object) -> str:
    if isinstance(value, list) and len(value) == 1:  # some LLM-Adapters files wrap the answer
        value = value[0]
    return "" if value is None or isinstance(value, (list, dict)) else str(value).strip()


def _read_json(path: Path, content: str, name: str) -> list[Example]:
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{name}: got {path}, which is not JSON ({error}), expected a list of objects"
        ) from None
    if not isinstance(rows, list):
        raise UserError(
            f"{name}: got a JSON {type(rows).__name__} in {path}, expected a list of objects"
        )
    examples = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or "instruction" not in row or "answer" not in row:
            given = (
                ", ".join(sorted(map(str, row))) if isinstance(row, dict) else type(row).__name__
            )
            raise UserError(
                f"{name}: got entry {number} of {path} with {given or 'nothing'}, expected an "
                "object with instruction, "
                "answer and, if there is one, input"
            )
        text = "\n".join(
            part for part in (_text(row["instruction"]), _text(row.get("input"))) if part
        )
        examples.append(
            _checked(text, _answer(row["answer"]), f"entry {number} of {path}", "answer", name)
        )
    return examples


def _read_csv(path: Path, content: str, name: str) -> list[Example]:
    reader = csv.DictReader(io.StringIO(content, newline=""))
    columns = reader.fieldnames or []
    if "text" not in columns or "label" not in columns:
        raise UserError(
            f"{name}: got columns {', '.join(columns) or 'none'} in {path}, expected text and label"
        )
    try:
        return [
            _checked(
                _text(row["text"]), _text(row["label"]), f"row {number} of {path}", "label", name
            )
            for number, row in enumerate(reader, start=1)
        ]
    except csv.Error as error:
        raise UserError(
            f"{name}: got {path}, which is not CSV ({error}), expected columns text and label"
        ) from None


def _checked(text: str, label: str, where: str, field: str, name: str) -> Example:
    if not text or not label:
        raise UserError(
            f"{name}: got {where} without {field if text else 'text'}, expected both a text and a "
            "label"
        )
    return Example(text, label)


def load_file(path: str | Path, seed: int, *, name: str = "--data") -> Dataset:
    """A dataset from a user's file: LLM-Adapters-style JSON, or a CSV with columns ``text`` and
    ``label``.

    JSON is a list of ``{instruction, input, output, answer}``: the text is instruction and input,
    the label the answer.

    Args:
        path: ends in .json or .csv. seed: of the split by row. name: the argument that errors name.

    Raises:
        UserError: no such file, malformed content, missing columns, no row, fewer than two labels.
    """
    path = Path(path)
    readers = {".json": _read_json, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise UserError(f"{name}: got {path}, expected a file that ends in .json or .csv")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise UserError(
            f"{name}: got {path}, which cannot be read ({reason}), expected a UTF-8 file"
        ) from None
    if not content.strip():
        raise UserError(f"{name}: got {path}, which is empty, expected labelled texts")
    rows = readers[path.suffix.lower()](path, content, name)
    if not rows:
        raise UserError(f"{name}: got {path} without a row, expected labelled texts")
    examples = deduplicate(rows)
    labels = sorted({example.label for example in examples})
    if len(labels) < 2:
        given = f"one label, {labels[0]!r}," if labels else "no text that has a single label"
        raise UserError(f"{name}: got {given} in {path}, expected at least two labels")
    train, held_out = split_by_row(examples, seed, name)
    dropped = len(rows) - len(examples)
    description = (
        f"{path.name}: {len(rows)} rows, {dropped} of them dropped as repeated or contradictory; "
        f"{len(labels)} labels; "
        f"a quarter of each label's rows is held out (seed {seed})."
    )
    return Dataset(train, held_out, labels, description)
