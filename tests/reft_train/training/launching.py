"""Settings, data and launchers of the tests that train in several processes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompts(count: int) -> list[dict]:
    """Prompts and completions of many lengths."""
    draw = random.Random(0)
    answers = ("yes he has 12", "no", "true is the answer")
    return [
        {"prompt": "how many apples " * draw.randint(1, 6), "completion": draw.choice(answers)}
        for _ in range(count)
    ]


def sentences(count: int) -> list[dict]:
    """Rows of sst2."""
    draw = random.Random(0)
    return [
        {"sentence": "she has apples " * draw.randint(1, 6), "label": draw.randint(0, 1)}
        for _ in range(count)
    ]


def settings(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """A short training on prompts under ``folder``, on the CPU."""
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    if not train.exists():
        write_rows(train, prompts(30))
        write_rows(test, prompts(5))
    common = {
        "task": "jsonl",
        "model": str(model),
        "train": str(train),
        "test": [str(test)],
        "cache": str(folder / "cache"),
        "device": "cpu",
        "rank": 4,
        "max_length": 64,
        "max_new_tokens": 4,
        "log_every": 1,
        "validation": 6,
        "epochs": 2,
        "batch_size": 2,
        "accumulation": 2,
        "lr": 5e-2,
        "save_every": 2,
        "evaluate_every": 2,
        "keep": 9,
        "skip_test": True,
    }
    return {**common, **changes}


def launch(program: list[str], launcher: tuple[str, ...] = TORCHRUN) -> subprocess.CompletedProcess:
    """Run a program (``-m module`` or a file, and its arguments) in two processes."""
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        [sys.executable, "-m", *launcher, *program],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def log(folder: Path) -> list[dict]:
    """A run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def column(folder: Path, name: str) -> list[tuple[int, float]]:
    """One quantity of a run's log: (step, value) pairs."""
    return [(line["step"], line[name]) for line in log(folder) if name in line]
