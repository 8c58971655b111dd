"""``demo``: train LoReFT on real weights and text, beside a frozen model and a plain
implementation, and report.

Here are the command's flags and their checks; :mod:`reft_train.demo.experiment` does the work.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from reft_train import arguments
from reft_train.errors import UserError
from reft_train.files import check_folder

if TYPE_CHECKING:
    from reft_train.demo.datasets import Dataset
    from reft_train.demo.settings import Settings

DESCRIPTION = """Classify which standard-library package a docstring comes from, or your own texts, with a frozen
encoder and a trained head, with LoReFT in plain PyTorch and with LoReFT by reft_kernels: one data set, order and start.
Prints a table; writes the adapter, loss curves and a report."""


def add_parser(subparsers) -> None:
    """Add the command and its flags."""
    summary = "train LoReFT on real weights and text, in minutes on a CPU"
    form = argparse.ArgumentDefaultsHelpFormatter
    command = subparsers.add_parser(
        "demo", help=summary, description=DESCRIPTION, formatter_class=form
    )
    add = command.add_argument
    add(
        "--model",
        metavar="FOLDER",
        help="encoder in Hugging Face's layout; none: the packaged all-MiniLM-L6-v2",
    )
    add(
        "--data",
        metavar="FILE",
        help="LLM-Adapters-style .json, or .csv with text and label; none: docstrings",
    )
    add("--rank", type=arguments.count(1, 256), default=8, metavar="R", help="rank of the edits")
    add(
        "--positions",
        type=arguments.positions,
        default="all",
        metavar="SPEC",
        help="tokens to edit: all, f7+l7, f3",
    )
    add(
        "--layers",
        type=arguments.layers,
        default="all",
        metavar="LIST",
        help="all, or layer numbers such as 0;2;4",
    )
    add(
        "--epochs",
        type=arguments.count(1),
        default=3,
        metavar="N",
        help="passes over the training part",
    )
    add(
        "--seed",
        type=arguments.count(0, 2**31 - 1),
        default=0,
        metavar="N",
        help="of weights, order, a file's split",
    )
    add(
        "--lr",
        type=arguments.rate,
        default=5e-3,
        metavar="RATE",
        help="highest learning rate of the edits",
    )
    add(
        "--head-lr",
        type=arguments.rate,
        default=1e-2,
        metavar="RATE",
        help="highest learning rate of the head",
    )
    add("--batch-size", type=arguments.count(1), default=32, metavar="N", help="examples in a step")
    add(
        "--max-length",
        type=arguments.count(4),
        default=48,
        metavar="N",
        help="tokens of a text that are read",
    )
    add(
        "--timing-steps",
        type=arguments.count(3),
        default=20,
        metavar="N",
        help="rounds of the timing",
    )
    add(
        "--threads",
        type=arguments.count(1),
        default=None,
        metavar="N",
        help="CPU threads; none: torch's choice",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: cuda where there is one",
    )
    add(
        "--cache",
        metavar="FOLDER",
        help="where the docstrings are kept; none: the user's cache folder",
    )
    add(
        "--out",
        default="runs/demo",
        metavar="FOLDER",
        help="where adapter, curves, report and numbers go",
    )
    command.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """The command; see :func:`reft_train.demo.experiment.run_demo` for the exit code.

    Raises:
        UserError: bad input, found before any training starts.
    """
    started = time.perf_counter()
    out = Path(parsed.out)
    check_folder(out, "--out")
    settings = resolve_settings(parsed)
    dataset = resolve_data(parsed)
    from reft_train.demo.experiment import run_demo

    print(dataset.description, file=sys.stderr)
    code = run_demo(settings, dataset, out)
    print(f"{time.perf_counter() - started:.0f} s in all")
    return code


def resolve_settings(parsed: argparse.Namespace) -> Settings:
    """Settings from parsed flags, checked against the model's configuration.

    Raises:
        UserError: a rank, a layer or a length that the model does not have, or a model that cannot
            be used.
    """
    import torch

    from reft_train.demo.encoder import load_tokenizer, model_shape, resolve_model
    from reft_train.demo.settings import Settings

    folder = resolve_model(parsed.model)
    width, depth, longest = model_shape(folder)
    if parsed.rank > width:
        raise UserError(
            f"--rank: got {parsed.rank}, expected at most the model's hidden size, {width}"
        )
    layers = list(range(depth)) if parsed.layers == "all" else parsed.layers
    if max(layers) >= depth:
        raise UserError(
            f"--layers: got {max(layers)}, expected 0 to {depth - 1}: the model has {depth} layers"
        )
    longest = min(longest, load_tokenizer(folder).model_max_length)
    if parsed.max_length > longest:
        raise UserError(
            f"--max-length: got {parsed.max_length}, expected at most {longest}, the model's "
            "longest input"
        )
    cuda = torch.cuda.is_available()
    if parsed.device == "cuda" and not cuda:
        raise UserError("--device: got cuda, but torch sees no CUDA device, expected cpu or auto")
    return Settings(
        model=str(folder),
        layers=layers,
        rank=parsed.rank,
        positions=parsed.positions,
        epochs=parsed.epochs,
        seed=parsed.seed,
        lr=parsed.lr,
        head_lr=parsed.head_lr,
        batch_size=parsed.batch_size,
        max_length=parsed.max_length,
        device="cuda" if cuda and parsed.device != "cpu" else "cpu",
        threads=parsed.threads or torch.get_num_threads(),
        timing_steps=parsed.timing_steps,
    )


def resolve_data(parsed: argparse.Namespace) -> Dataset:
    """The dataset that the flags ask for.

    Raises:
        UserError: a file that cannot be used.
    """
    if parsed.data is not None:
        from reft_train.demo.datasets import load_file

        return load_file(parsed.data, parsed.seed)
    from reft_train.demo.stdlib_docs import load_stdlib

    return load_stdlib(None if parsed.cache is None else Path(parsed.cache))
