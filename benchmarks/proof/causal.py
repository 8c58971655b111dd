"""Train, interrupt, resume and score LoReFT on a causal model, end to end.

    python -m benchmarks.proof.causal --data FOLDER      # FOLDER/gsm8k/test.json, in the layout of
                                                         # LLM-Adapters

The base is a small Llama trained from scratch on the standard library's sources
(:mod:`benchmarks.proof.stdlib_llama`), which knows no arithmetic. LoReFT is trained on a few gsm8k
rows until the model repeats them, and the same rows are scored: the check is whether training,
generation, positions and files work together, not whether a tiny model can reason. One run is
interrupted by Ctrl-C and resumed, another is not interrupted, and both must log the same losses.
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
from reft_train.reporting import versions

from benchmarks import machine
from benchmarks.proof.stdlib_llama import train_llama

# all positions are edited: in so small a model, edits of the prompt alone cannot store long texts
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


def _entries(log: Path) -> list[dict]:
    """Return the entries of a run's log; a line that is being written is left out."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").split("\n")[:-1] if line]


def command(*words: object) -> list[str]:
    """Return a reft-train command line."""
    return [sys.executable, "-m", "reft_train", *map(str, words)]


def interrupted(words: list[str], log: Path, step: int) -> None:
    """Run a command until its log has a step, then interrupt it as Ctrl-C does.

    Raises:
        RuntimeError: If it ended earlier, or with another exit code than 130.
    """
    process = subprocess.Popen(words)
    while process.poll() is None and not (
        log.is_file() and any(e["step"] >= step for e in _entries(log))
    ):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    if process.wait() != 130:
        raise RuntimeError(
            f"the interrupted run ended with exit code {process.returncode}, expected 130"
        )


def scores(folder: Path, targets: dict[str, str]) -> dict[str, float]:
    """Return the task's accuracy, and the share of answers that repeat their row's text exactly."""
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
    """Return the logged training losses of a run."""
    return [
        (entry["step"], entry["loss"])
        for entry in _entries(folder / "log.jsonl")
        if "loss" in entry
    ]


def sound_rows(path: Path, count: int) -> list[dict]:
    """Return the first rows whose own text gives their answer by the task's rule.

    More than a third of the file's rows do not.
    """
    task = tasks.get("gsm8k")
    rows = [
        row
        for row in read_rows(path, "--data")
        if task.score(task.example(row).target, task.example(row)).right
    ]
    return [dict(row.fields) for row in rows[:count]]


def prove(data: Path, out: Path, rows: int, seconds: float, settings: list[str]) -> dict:
    """Run all steps and return the results."""
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
        | {"model": "base", "data": "data", "output": "whole"},  # without local paths
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
    """Run the command line and write ``causal.json``."""
    parser = argparse.ArgumentParser(
        description="Train a small base, adapt it to gsm8k rows, interrupt, resume, score."
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/test.json")
    parser.add_argument("--out", type=Path, default=Path("runs/proof-causal"))
    parser.add_argument("--results", type=Path, help="folder of causal.json (default: --out)")
    parser.add_argument("--rows", type=int, default=4, help="number of gsm8k rows to train on")
    parser.add_argument("--base-seconds", type=float, default=240, help="training time of the base")
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
