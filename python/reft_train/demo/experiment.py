"""The demo's work: train the variants, time them, load the adapter again, and write what came
out.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from reft_train.demo.batching import Encoded, encode
from reft_train.demo.datasets import Dataset
from reft_train.demo.encoder import load_tokenizer
from reft_train.demo.report import write_report
from reft_train.demo.results import Result
from reft_train.demo.settings import Settings
from reft_train.demo.table import notes, render, rows
from reft_train.demo.timing import measure
from reft_train.demo.training import predict
from reft_train.demo.variants import KERNELS, TORCH, VARIANTS, classifier, load_reft
from reft_train.demo.worker import ADAPTER, LOGITS, run_isolated, run_variant
from reft_train.files import replace_folder

SAME_STEPS = (
    50  # over which the two LoReFTs' losses are compared; rounding makes them drift apart later
)


def reload_check(
    settings: Settings, held_out: Encoded, num_labels: int, folder: Path
) -> tuple[bool, str]:
    """Load ``folder``'s adapter into a fresh model and compare its logits, bit by bit, with the
    trained model's.
    """
    expected = load_file(str(folder / LOGITS))["logits"]
    # another seed, so another head: the trained one can come from the file alone
    fresh = load_reft(
        classifier(replace(settings, seed=settings.seed + 1), num_labels), folder / ADAPTER
    )
    given = predict(fresh.to(settings.device), held_out, settings.device)
    if torch.equal(expected, given):
        return (
            True,
            f"adapter saved and loaded into a fresh model: all {len(given)} held-out predictions "
            "bit-identical",
        )
    worst = (expected - given).abs().max().item()
    return (
        False,
        "FAILED: the reloaded adapter's logits differ from the trained model's by up to "
        f"{worst:.3g}",
    )


def agreement(results: list[Result]) -> str:
    """How closely the two LoReFT trainings follow each other."""
    plain, ours = (
        next(r.losses[:SAME_STEPS] for r in results if r.name == name) for name in (TORCH, KERNELS)
    )
    gap = max(abs(a - b) for a, b in zip(plain, ours, strict=True))
    return f"the two LoReFTs' losses differ by at most {gap:.1e} in the first {len(plain)} steps"


def run_demo(settings: Settings, dataset: Dataset, out: Path, *, isolate: bool = True) -> int:
    """Train, time, load again and report; ``out`` gets adapter, curves, report and numbers when all
    is done.

    Args:
        isolate: train each variant in a process of its own, as its peak memory needs; False trains
            in this one.

    Returns:
        0; 1 when a training failed or the reloaded adapter's predictions differ.
    """
    out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=out, prefix=".work-"))
    runner = run_isolated if isolate else run_variant
    try:
        results = [runner(name, settings, dataset, work / name) for name in VARIANTS]
        tokenizer, count = load_tokenizer(Path(settings.model)), len(dataset.labels)
        train_data, held_out = (
            encode(tokenizer, part, dataset.labels, settings.max_length)
            for part in (dataset.train, dataset.held_out)
        )
        same, reloaded = reload_check(settings, held_out, count, work / KERNELS)
        times = measure(settings, train_data, count)
        table, captions, checks = (
            rows(results, times, dataset),
            notes(results, times, settings),
            [reloaded],
        )
        checks.append(agreement(results))
        adapter = replace_folder(work / KERNELS / ADAPTER, out / "adapter")
        written = write_report(out, results, times, table, captions, checks, dataset, settings)
    except (RuntimeError, FloatingPointError) as error:
        print(f"reft_train demo: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print("\n".join(["", render(table), "", *captions, *checks, ""]))
    print("written: " + ", ".join(map(str, [adapter, *written])))
    return 0 if same else 1
