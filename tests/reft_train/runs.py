"""Small data files and runs of the command in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reft_train.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def instructions(count: int) -> list[dict]:
    """Rows of instruction and output, prompts of different lengths."""
    return [
        {"instruction": "how many apples? " * (1 + i % 5) + str(i), "output": f"He has {i % 4}"}
        for i in range(count)
    ]


def boolq(count: int) -> list[dict]:
    """Rows as LLM-Adapters lays out a set of two classes."""
    rows = []
    for i in range(count):
        answer = ("true", "false")[i % 2]
        instruction = f"Question: is {i} even? {'please ' * (i % 5)}\n\nAnswer format: true/false"
        rows.append(
            {
                "instruction": instruction,
                "input": "",
                "output": f"the correct answer is {answer}",
                "answer": answer,
            }
        )
    return rows


def write_rows(path: Path, rows: Sequence[dict]) -> Path:
    """A .json or .jsonl file of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        json.dumps(rows)
        if path.suffix == ".json"
        else "".join(json.dumps(row) + "\n" for row in rows)
    )
    path.write_text(lines, encoding="utf-8")
    return path


def flags(**settings: Any) -> list[str]:
    """Settings as flags: lists give several values, booleans the flag or its --no- form."""
    parts: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            parts.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            parts += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return parts


def run(model: Path, output: Path, **settings: Any) -> int:
    """``reft_train run`` with settings that suit two-layer models, on the CPU, without the user's
    cache.
    """
    return main(command(model, output, **settings))


def command(model: Path, output: Path, **settings: Any) -> list[str]:
    """The arguments of :func:`run`."""
    small = {
        "task": "jsonl",
        "batch_size": 4,
        "accumulation": 2,
        "epochs": 1,
        "rank": 2,
        "positions": "f2+l2",
        "lr": 0.01,
        "max_length": 64,
        "max_new_tokens": 4,
        "log_every": 1,
        "cache": output.parent / "cache",
        "device": "cpu",
    }
    return ["run", *flags(**{**small, "model": model, "output": output, **settings})]


def in_process(
    arguments: Sequence[str], program: str | None = None, **options: Any
) -> subprocess.Popen:
    """The command in a process of its own; ``program`` runs instead of the command, with its
    arguments.
    """
    start = ["-m", "reft_train"] if program is None else ["-c", program]
    environment = {
        "PYTHONPATH": f"{ROOT / 'python'}:{ROOT}",
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
        "HOME": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, *start, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def logged(output: Path, name: str = "loss") -> list[tuple[int, float]]:
    """(step, value) pairs of a run's log."""
    entries = [
        json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [(entry["step"], entry[name]) for entry in entries if name in entry]


def adapter_bytes(folder: Path) -> bytes:
    """An adapter's file, bit for bit."""
    return (folder / "adapter_model.safetensors").read_bytes()


def adapter_tensors(folder: Path) -> dict[str, bytes]:
    """The bytes of each tensor of a saved adapter."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
