"""A causal path from end to end: a base trained from scratch, LoReFT on gsm8k rows, an
interruption, a resume, and the score.

The base is a small Llama trained on the standard library's text
(:mod:`benchmarks.proof.stdlib_llama`), which knows no arithmetic. LoReFT is trained on a few gsm8k
rows until it repeats them; the very rows are then scored, since what is asked is whether training,
generation, positions and files fit together, not whether a tiny model can reason. One run is
stopped by Ctrl-C and resumed, another is left alone, and both must log the same losses.

    python -m benchmarks.proof.causal --data FOLDER      # FOLDER/gsm8k/test.json, as LLM-Adapters
                                                         lays it out
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from reft_train import tasks
from reft_train.data.reading import read_rows
from reft_train.files import write_text
from reft_train.reporting.log import read_log
from reft_train.reporting.versions import versions

from benchmarks import machine
from benchmarks.proof.stdlib_llama import train_llama

# edits at all positions: those at a prompt alone cannot hold texts of a hundred tokens in so small
# a model
SETTINGS = (
    "--positions",
    "all",
    "--rank",
    "128",
    "--lr",
    "1e-2",
    "--schedule",
    "cosine",
    "--warmup",
    "0.05",
    "--max-steps",
    "500",
    "--batch-size",
    "4",
    "--accumulation",
    "1",
    "--max-new-tokens",
    "200",
    "--save-every",
    "1000",
)


def command(*words: object) -> list[str]:
    """A reft-train command line."""
    return [sys.executable, "-m", "reft_train", *map(str, words)]


def interrupted(words: list[str], log: Path, step: int) -> None:
    """Run a command until its log has a step, then press Ctrl-C.

    Raises:
        RuntimeError: it ended before, or not as an interrupted run should.
    """
    process = subprocess.Popen(words)
    while process.poll() is None and not (
        log.is_file() and any(e["step"] >= step for e in read_log(log))
    ):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    if process.wait() != 130:
        raise RuntimeError(
            f"the interrupted run ended with exit code {process.returncode}, expected 130"
        )


def scores(folder: Path, targets: dict[str, str]) -> dict[str, float]:
    """Accuracy by the task's rule, and the part of answers that repeat their row's text to the
    letter.
    """
    lines = [
        json.loads(line)
        for line in (folder / "predictions" / "gsm8k.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    exact = sum(line["generated"].strip() == targets[line["instruction"]] for line in lines)
    return {
        "accuracy": sum(line["right"] for line in lines) / len(lines),
        "exact_text": exact / len(lines),
    }


def losses(folder: Path) -> list[tuple[int, float]]:
    """The logged training losses of a run."""
    return [
        (entry["step"], entry["loss"])
        for entry in read_log(folder / "log.jsonl")
        if "loss" in entry
    ]


def sound_rows(path: Path, count: int) -> list[dict]:
    """The first rows whose own text leads to their answer by the task's rule, which a good third
    of the file's do not.
    """
    task = tasks.get("gsm8k")
    rows = [
        row
        for row in read_rows(path, "--data")
        if task.score(task.example(row).target, task.example(row)).right
    ]
    return [dict(row.fields) for row in rows[:count]]


def prove(data: Path, out: Path, rows: int, seconds: float, settings: list[str]) -> dict:
    """Do all of it and return the numbers."""
    base = out / "base"
    model = train_llama(base, seconds)
    chosen = sound_rows(data / "gsm8k" / "test.json", rows)
    for part in ("train", "test"):
        write_text(out / "data" / "gsm8k" / f"{part}.json", json.dumps(chosen))
    targets = {row["instruction"]: row["output"].strip() for row in chosen}
    common = [
        "run",
        "--task",
        "gsm8k",
        "--model",
        base,
        "--data",
        out / "data",
        "--log-every",
        1,
        *SETTINGS,
        *settings,
    ]
    whole, resumed = out / "whole", out / "resumed"
    subprocess.run(command(*common, "--output", whole), check=True)
    total = json.loads((whole / "results.json").read_text(encoding="utf-8"))
    interrupted(command(*common, "--output", resumed), resumed / "log.jsonl", total["steps"] // 3)
    subprocess.run(command("run", "--config", resumed / "config.yaml", "--resume"), check=True)
    frozen = [
        "eval",
        "--model",
        base,
        "--task",
        "gsm8k",
        "--data",
        out / "data",
        "--adapter",
        "none",
        "--out",
        out / "frozen",
    ]
    subprocess.run(command(*frozen), check=True)
    subprocess.run(command("eval", "--run", resumed), check=True)
    logged = losses(whole)
    return {
        "base": model,
        "rows": rows,
        "settings": total["config"]
        | {"model": "base", "data": "data", "output": "whole"},  # no paths of this machine
        "trained_numbers": total["trainable"],
        "steps": total["steps"],
        "first_loss": logged[0][1],
        "last_loss": logged[-1][1],
        "frozen": scores(out / "frozen", targets),
        "loreft": scores(resumed / "eval", targets),
        "resumed_losses_are_the_uninterrupted_ones": losses(resumed) == logged,
        "orthonormality": total["orthonormality"],
        "seconds": total["seconds"],
        "machine": machine.device_name("cpu"),
        "commit": machine.commit(),
        "versions": versions(),
    }


def main() -> None:
    """Parse, prove, print and write ``causal.json``."""
    parser = argparse.ArgumentParser(
        description="Train a small base, adapt it to gsm8k rows, interrupt, resume, score."
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/test.json")
    parser.add_argument("--out", type=Path, default=Path("runs/proof-causal"))
    parser.add_argument("--results", type=Path, help="where causal.json goes; none: --out")
    parser.add_argument("--rows", type=int, default=4, help="gsm8k rows to learn by heart")
    parser.add_argument(
        "--base-seconds", type=float, default=240, help="how long the base is trained"
    )
    parsed, settings = parser.parse_known_args()
    result = prove(parsed.data, parsed.out, parsed.rows, parsed.base_seconds, settings)
    print(
        json.dumps(
            {name: value for name, value in result.items() if name not in ("settings", "versions")},
            indent=1,
        )
    )
    write_text((parsed.results or parsed.out) / "causal.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
