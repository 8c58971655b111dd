"""Provide the CUDA library for the GPU at hand: an existing one if it fits, else a new build.

    python -m benchmarks.gpu_pass.cuda_library [--arch 90] [--dry-run]

A library is used as it is if it loads and was built from the present sources, which the file
``_native_cuda.sources`` beside it says. One without that file is used if it loads, too, since it
was put there on purpose; the output says so. Exit status: 0 with a library, 1 without.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
LOADS = """
import torch
from reft_kernels import cuda
reason = cuda.unsupported_reason("edit", "cuda", torch.float32)
print(reason or "loads")
raise SystemExit(reason is not None)
"""


def digest(folder: Path = SOURCES) -> str:
    """Return a digest of the sources of the library."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def loads() -> str:
    """Return an empty string if the library loads in a new process, else the reason."""
    done = subprocess.run(
        [sys.executable, "-c", LOADS], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if done.returncode == 0:
        return ""
    lines = (done.stdout + done.stderr).strip().splitlines() or [f"status {done.returncode}"]
    return lines[-1]


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_pass.cuda_library")
    parser.add_argument("--arch", help="compute capability of the GPU, such as 90")
    parser.add_argument("--dry-run", action="store_true", help="print the build's commands")
    parser.add_argument("--out", type=Path, default=ROOT / "reft_kernels")
    args = parser.parse_args(argv)
    library, stamp = args.out / "_native_cuda.so", args.out / "_native_cuda.sources"
    current = digest()
    if library.exists() and not args.dry_run:
        recorded = stamp.read_text().strip() if stamp.exists() else ""
        reason = loads() if recorded in ("", current) else "it was built from other sources"
        if not reason:
            print(f"used as it is: {library}" + ("" if recorded else ", from unknown sources"))
            return 0
        print(f"built anew: {library}: {reason}")
    command = [sys.executable, str(ROOT / "csrc" / "build.py"), "--cuda", "--out", str(args.out)]
    command += ["--arch", args.arch] if args.arch else []
    command += ["--dry-run"] if args.dry_run else []
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status == 0 and not args.dry_run:
        stamp.write_text(current + "\n")
        reason = loads()
        if reason:
            print(f"does not load: {reason}", file=sys.stderr)
            return 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
