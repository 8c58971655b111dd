"""Print ESTIMATES of the kernels' times on a GPU, from the compiled code.

    python -m benchmarks.roofline [--d 4096] [--rank 8] [--dtype bfloat16] [--rows N ...]
        [--arch sm_90] [--operator edit ...] [--backend triton cuda] [--instances] [--markdown]
        [--out FILE] [--save]

No GPU is needed and none is used. The model is in :mod:`benchmarks.roofline.model`. Both backends
are estimated side by side; ``csrc/cuda`` needs nvcc. ``--instances`` adds what the machine code of
all its kernels does. Without ``--rows``, edits of selected rows are estimated at ranks 32 and 64
too. ``--save`` keeps the table for ``python -m benchmarks.page``.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import torch

from benchmarks import machine
from benchmarks.roofline import native, saved, shapes, table
from benchmarks.roofline.targets import TARGETS
from benchmarks.rows import RESULTS

OPERATORS = ("edit", "edit backward", "R build", "R build backward")


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}, expected at least 1")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline",
        description="Print estimates of the kernels' times on a GPU, from the compiled code.",
    )
    parser.add_argument("--d", type=_positive, default=4096, help="columns (default: 4096)")
    parser.add_argument("--rank", type=_positive, default=8, help="rank (default: 8)")
    parser.add_argument("--rows", type=_positive, nargs="+", help="numbers of rows")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--arch",
        choices=[name for name, target in TARGETS.items() if target.backend == "cuda"],
        default="sm_90",
        help="what the code is compiled for; the assumptions are those of an H200",
    )
    parser.add_argument("--operator", choices=OPERATORS, nargs="+", default=OPERATORS)
    parser.add_argument(
        "--backend",
        choices=("triton", "cuda"),
        nargs="+",
        default=("triton", "cuda"),
        help="backends to estimate (default: both)",
    )
    parser.add_argument(
        "--instances", action="store_true", help="list all kernels of csrc/cuda with their accesses"
    )
    parser.add_argument("--markdown", action="store_true", help="print markdown")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write to a file")
    parser.add_argument(
        "--save", action="store_true", help=f"write the table to benchmarks/results/{saved.NAME}"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = _parser().parse_args(argv)
    if args.rank > args.d:
        print(f"--rank: got {args.rank}, expected at most d = {args.d}", file=sys.stderr)
        return 2
    if ("cuda" in args.backend or args.instances) and native.nvcc() is None:
        print(
            "nvcc: not found; install the CUDA toolkit, set CUDA_HOME, or use --backend triton",
            file=sys.stderr,
        )
        return 2
    target = TARGETS[args.arch]
    rows = tuple(args.rows) if args.rows else None
    answers = []
    shape = (args.d, args.rank, getattr(torch, args.dtype), rows)
    asked = [shapes.questions(*shape, backend) for backend in args.backend]
    if rows is None:
        for backend, found in zip(args.backend, asked, strict=True):
            found += shapes.wide_questions(*shape[:3], backend)
    for alternatives in zip(*asked, strict=True):
        for backend, question in zip(args.backend, alternatives, strict=True):
            if question.operator in args.operator:
                answer = table.native_answer if backend == "cuda" else table.answer
                answers.append(answer(question, target))
    cells, title = (
        table.lines(filter(None, answers)),
        f"d = {args.d}, r = {args.rank}, {args.dtype}",
    )
    layout = table.markdown if args.markdown else table.text
    bullet = "- " if args.markdown else ""
    parts = [
        f"ESTIMATES, {title}",
        layout(table.HEAD, cells),
        table.NOTE,
        "\n".join(bullet + line for line in table.assumptions(target)),
    ]
    if args.instances:
        found = [
            kernel
            for source in sorted(native.SOURCES.glob("*.cu"))
            for kernel in native.kernels(source, args.arch)
        ]
        parts += ["csrc/cuda, all instances", layout(native.HEAD, native.lines(found), 1)]
    page = "\n\n".join(parts) + "\n"
    if args.save:
        notes = table.assumptions(target)
        saved.write(
            saved.Saved(title, machine.commit(), table.HEAD, cells, table.NOTE, notes), RESULTS
        )
    if args.out:
        args.out.write_text(page, encoding="utf-8")
    else:
        print(page, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
