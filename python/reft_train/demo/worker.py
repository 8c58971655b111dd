"""One variant in a process of its own, so that its peak memory is its own: ``python -m
reft_train.demo.worker PLAN``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from reft_train.children import environment
from reft_train.demo.batching import encode
from reft_train.demo.datasets import Dataset
from reft_train.demo.encoder import load_tokenizer
from reft_train.demo.results import Result
from reft_train.demo.settings import Settings
from reft_train.demo.training import accuracy, predict, train
from reft_train.demo.variants import KERNELS, TITLES, build
from reft_train.files import write_text
from reft_train.memory import PeakMeter

RESULT, LOGITS, ADAPTER, DATA = "result.json", "logits.safetensors", "adapter", "data.json"


def run_variant(name: str, settings: Settings, dataset: Dataset, folder: Path) -> Result:
    """Train a variant, answer the held-out examples once, and write result, logits and
    reft_kernels' adapter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(settings.threads)
    tokenizer = load_tokenizer(Path(settings.model))
    train_data, held_out = (
        encode(tokenizer, part, dataset.labels, settings.max_length)
        for part in (dataset.train, dataset.held_out)
    )
    variant = build(name, settings, len(dataset.labels))
    meter = PeakMeter(torch.device(settings.device))
    meter.start()
    trained = train(variant, train_data, settings)
    memory = meter.stop()
    logits = predict(variant.model, held_out, settings.device)
    save_file({"logits": logits}, str(folder / LOGITS))
    if name == KERNELS:
        variant.model.save_pretrained(str(folder / ADAPTER))
        write_text(folder / ADAPTER / "labels.json", json.dumps(dataset.labels, ensure_ascii=False))
    right = accuracy(logits, held_out)
    result = Result(
        name, variant.edit_count, variant.head_count, right, trained.losses, trained.seconds, memory
    )
    write_text(folder / RESULT, result.to_json())
    return result


def run_isolated(name: str, settings: Settings, dataset: Dataset, folder: Path) -> Result:
    """As :func:`run_variant`, in a fresh process, whose output and errors go where this one's go.

    Raises:
        RuntimeError: the process failed; it has said why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / DATA, dataset.to_json())
    plan = {"name": name, "settings": asdict(settings), "folder": str(folder)}
    write_text(folder / "plan.json", json.dumps(plan))
    command = [sys.executable, "-m", "reft_train.demo.worker", str(folder / "plan.json")]
    code = subprocess.run(
        command, env={**environment(), "HF_HUB_OFFLINE": "1"}, check=False
    ).returncode
    if code:
        raise RuntimeError(f"{TITLES[name]}: its process ended with exit code {code}")
    return Result.from_json((folder / RESULT).read_text(encoding="utf-8"))


def main() -> None:
    """Run the plan whose path is the only argument."""
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder = Path(plan["folder"])
    dataset = Dataset.from_json((folder / DATA).read_text(encoding="utf-8"))
    run_variant(plan["name"], Settings(**plan["settings"]), dataset, folder)


if __name__ == "__main__":
    main()
