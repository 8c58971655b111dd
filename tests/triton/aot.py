"""Compile Triton kernels ahead of time without a GPU and report the resources of each.

    python tests/triton/aot.py [--full] [--target sm_90 ...]

The script prints one line of JSON per compiled kernel, with its target, d, r, dtype, flags,
registers, spills, stack and shared memory in bytes, and the target's limit. It must run in its own
process, because kernels cannot be compiled under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

TARGETS = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}
DIMS = (768, 2048, 4096, 5120, 8192)
RANKS = (1, 4, 8, 16, 32, 64)
_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class Spec(NamedTuple):
    """One specialization of a kernel: the arguments of ``triton.compile`` and a label."""

    label: str
    kernel: object
    # argument -> "*fp32", "i32", ...; without arguments that are None
    signature: dict[str, str]
    constants: dict[str, object]
    num_warps: int
    num_stages: int


def _spec(label, kernel, pointers, integers, constants, config, d, r, unit_strides=()) -> Spec:
    signature = {name: f"*{kind}" for name, kind in pointers.items()}
    signature |= dict.fromkeys(integers, "i32")
    constants = dict(constants)
    for name in unit_strides:
        signature.pop(name)
        constants[name] = 1
    if r == 1:  # Triton's launcher specializes arguments that are 1
        signature.pop("r")
        constants["r"] = 1
    return Spec(
        label, kernel, signature, constants, config.num_warps, getattr(config, "num_stages", 2)
    )


def edit_specs(d: int, r: int, dtype: str, backend: str) -> Iterator[Spec]:
    """Yield the edit's three kernels for selected and for all rows.

    LoReFT folded and unfolded, gelu, weight sets and coefficients.
    """
    import torch

    forward = importlib.import_module("reft_kernels.triton.edit")
    all_rows = importlib.import_module("reft_kernels.triton.edit_all_rows")
    delta = importlib.import_module("reft_kernels.triton.edit_delta")
    gradient = importlib.import_module("reft_kernels.triton.edit_gradient")
    h, torch_dtype = _TYPES[dtype], getattr(torch, dtype)
    # as in common.dot_precision
    precision = None if dtype != "float32" else ("tf32x3" if backend == "cuda" else "ieee")
    small_precision = "bf16" if dtype == "bfloat16" else precision
    amd = backend == "hip"
    on_chip = all_rows.all_rows_config(d, r, torch_dtype, 227 * 1024, amd)
    if on_chip is not None:
        for activation, scale in (("linear", {}), ("gelu", {"coeff": "fp32"})):
            yield _spec(
                f"edit_all_rows[{activation}]",
                all_rows.edit_all_rows_kernel,
                {"source": h, "out": h, "read": "fp32", "read_bias": "fp32", "write": "fp32"}
                | scale
                | {"u_out": "fp32", "z_out": "fp32"},
                (
                    "num_rows",
                    "d",
                    "r",
                    "source_stride_n",
                    "source_stride_d",
                    "out_stride_n",
                    "out_stride_d",
                ),
                {
                    "ACTIVATION": activation,
                    "SAVE": True,
                    "EVEN": d % on_chip.block_d == 0,
                    "TILES": on_chip.tiles,
                    "BLOCK_N": on_chip.block_n,
                    "BLOCK_D": on_chip.block_d,
                    "BLOCK_R": on_chip.block_r,
                    "SLICES": on_chip.slices,
                    "PRECISION": precision,
                    "SMALL_PRECISION": small_precision,
                },
                on_chip,
                d,
                r,
                ("source_stride_d", "out_stride_d"),
            )
    for regime, rows in (("selected", 448), ("all", 8192)):
        selected = regime == "selected"
        for flags, activation, subtract_projection, extra in (
            ("folded", "linear", False, False),
            ("loreft", "linear", True, False),
            ("gelu+sets+coeff", "gelu", True, True),
        ):
            label = f"{regime},{flags}"
            config = forward.edit_config(rows, d, r, torch_dtype, subtract_projection, amd)
            gradient_config = gradient.gradient_config(rows, d, r, 1, torch_dtype, extra, amd)
            plain = delta.delta_config(rows, d, r, torch_dtype, amd)
            blocks, plain_blocks = (
                {"BLOCK_N": c.block_n, "BLOCK_D": c.block_d, "BLOCK_R": c.block_r}
                for c in (config, plain)
            )
            blocks |= {
                "EVEN": d % config.block_d == 0,
                "SLICES": config.slices,
                "STAGES": config.num_stages,
                "PRECISION": precision,
                "SMALL_PRECISION": small_precision,
            }
            index = ({"rows": "i32"} if selected else {}) | ({"weight_ids": "i32"} if extra else {})
            scale = {"coeff": "fp32"} if extra else {}
            weights = {"read": "fp32", "read_bias": "fp32", "write": "fp32"}
            saved = {"saved_input": h, "u_out": "fp32", "z_out": "fp32"}
            common = {"USE_DOT": plain.use_dot, "PRECISION": precision}
            yield _spec(
                f"edit[{label}]",
                forward.edit_kernel,
                {"source": h, "out": h} | index | weights | scale | saved,
                (
                    "num_rows",
                    "d",
                    "r",
                    "source_stride_n",
                    "source_stride_d",
                    "out_stride_n",
                    "out_stride_d",
                ),
                {"SUBTRACT": subtract_projection, "ACTIVATION": activation, "SAVE": True} | blocks,
                config,
                d,
                r,
                ("source_stride_d", "out_stride_d"),
            )
            extras = {"ddelta_out": "fp32"} if extra else {}
            yield _spec(
                f"delta[{label}]",
                delta.delta_kernel,
                {"grad": h}
                | index
                | {"write": "fp32"}
                | scale
                | {"u": "fp32", "z": "fp32", "dz_out": "fp32", "dcoeff_out": "fp32"}
                | extras,
                ("num_rows", "d", "r", "grad_stride_n", "grad_stride_d"),
                {"ACTIVATION": activation} | plain_blocks | common,
                plain,
                d,
                r,
                ("grad_stride_d",),
            )
            one = gradient_config.chunks == 1
            yield _spec(
                f"gradient[{label}]",
                gradient.gradient_kernel,
                {"grad": h, "out": h, "saved_input": h}
                | index
                | {"read": "fp32", "write": "fp32"}
                | scale
                | {"u": "fp32", "dz": "fp32"}
                | ({"ddelta": "fp32"} if extra else {})
                | {
                    "grad_read": "fp32",
                    "grad_read_bias": "fp32",
                    "grad_write": "fp32",
                    "grad_subtract_bias": "fp32",
                }
                | ({} if one else {"partials": "fp32", "counters": "i32"}),
                (
                    "num_rows",
                    "num_sets",
                    "chunks",
                    "d",
                    "r",
                    "grad_stride_n",
                    "grad_stride_d",
                    "out_stride_n",
                    "out_stride_d",
                    "saved_stride_n",
                    "saved_stride_d",
                ),
                {
                    "SUBTRACT": subtract_projection,
                    "LINEAR": not extra,
                    "NEED_WEIGHTS": True,
                    "ONE_CHUNK": one,
                    "PHASES": gradient_config.phases,
                    "BLOCK_N": gradient_config.block_n,
                    "BLOCK_D": gradient_config.block_d,
                    "BLOCK_R": gradient_config.block_r,
                    "PRECISION": precision,
                    "SMALL_PRECISION": precision,
                },
                gradient_config,
                d,
                r,
                ("grad_stride_d", "out_stride_d", "saved_stride_d"),
            )


def red_specs(d: int, dtype: str) -> Iterator[Spec]:
    """Yield RED's two kernels."""
    red = importlib.import_module("reft_kernels.triton.red")
    h = _TYPES[dtype]
    for rows in (448, 8192):
        config = red.red_config(rows, d, 1)
        selected = rows == 448
        index = {"rows": "i32"} if selected else {}
        blocks = {"BLOCK_N": config.block_n, "BLOCK_D": config.block_d}
        yield _spec(
            f"red[{rows}]",
            red.red_kernel,
            {"source": h, "out": h} | index | {"scale": "fp32", "bias": "fp32", "saved_input": h},
            ("num_rows", "d", "source_stride_n", "source_stride_d", "out_stride_n", "out_stride_d"),
            {"SAVE": selected} | blocks,
            config,
            d,
            2,
            ("source_stride_d", "out_stride_d"),
        )
        one = config.chunks == 1
        yield _spec(
            f"red_backward[{rows}]",
            red.red_backward_kernel,
            {"grad": h, "out": h, "saved_input": h}
            | index
            | {"scale": "fp32", "grad_scale": "fp32", "grad_bias": "fp32"}
            | ({} if one else {"partials": "fp32", "counters": "i32"}),
            (
                "num_rows",
                "num_sets",
                "chunks",
                "d",
                "grad_stride_n",
                "grad_stride_d",
                "out_stride_n",
                "out_stride_d",
                "saved_stride_n",
                "saved_stride_d",
            ),
            {"NEED_WEIGHTS": True, "ONE_CHUNK": one} | blocks,
            config,
            d,
            2,
            ("grad_stride_d", "out_stride_d", "saved_stride_d"),
        )


def orthonormal_specs(d: int, r: int) -> Iterator[Spec]:
    """Yield the kernels that build R and D."""
    module = importlib.import_module("reft_kernels.triton.orthonormal")
    for entry in module.aot_specs(d, r):
        kernel, signature, constants, num_warps, num_stages = entry
        yield Spec(kernel.__name__, kernel, signature, constants, num_warps, num_stages)


def specs(group: str, d: int, r: int, dtype: str, backend: str) -> list[Spec]:
    """Yield all specializations of a group ("edit", "red" or "orthonormal") at one shape."""
    if group == "edit":
        return list(edit_specs(d, r, dtype, backend))
    return list(red_specs(d, dtype)) if group == "red" else list(orthonormal_specs(d, r))


def _cuda_usage(log: str) -> dict[str, int]:
    """Read the resources from the assembler's report.

    The stack size that cuobjdump prints includes more than spilled registers.
    """

    def total(pattern: str) -> int:
        results = re.findall(pattern, log)
        assert results, f"the assembler reported no {pattern!r}: {log[:500]!r}"
        return sum(int(n) for n in results)

    return {
        "registers": total(r"Used (\d+) registers"),
        "stack": total(r"(\d+) bytes stack frame"),
        "spills": total(r"(\d+) bytes spill stores"),
    }


def _hip_usage(assembly: str) -> dict[str, int]:
    def number(key: str) -> int:
        return max((int(v) for v in re.findall(rf"\.{key}:\s*(\d+)", assembly)), default=0)

    # spilled scalar registers are not counted: they go to vector registers, not to memory
    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),
    }


def compile_one(job: tuple[str, int, int, str, int, str]) -> dict[str, object]:
    """Compile one specialization for one target and return its resources."""
    group, d, r, dtype, index, target = job
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    spec = specs(group, d, r, dtype, TARGETS[target][0])[index]
    backend, arch, warp, limit = TARGETS[target]
    names = spec.kernel.arg_names
    signature = {name: spec.signature.get(name, "constexpr") for name in names}
    constants = {name: spec.constants.get(name) for name in names if signature[name] == "constexpr"}
    # tensors are 16-byte aligned, and d and the row strides are multiples of 16
    aligned = [
        n for n in names if signature[n].startswith("*") or n == "d" or n.endswith("stride_n")
    ]
    attrs = {
        (names.index(n),): [["tt.divisibility", 16]] for n in aligned if signature[n] != "constexpr"
    }
    source = ASTSource(spec.kernel, signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    if group != "red" and backend == "cuda":
        options |= importlib.import_module(
            "reft_kernels.triton.common"
        ).CUDA_OPTIONS  # as the launches do
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # cached kernels have no log
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)
    usage = _cuda_usage(log.getvalue()) if backend == "cuda" else _hip_usage(compiled.asm["amdgcn"])
    row = {"kernel": spec.label, "target": target, "d": d, "r": r, "dtype": dtype, **usage}
    return row | {"shared": compiled.metadata.shared, "shared_limit": limit}


def jobs(full: bool, targets: list[str]) -> list[tuple[str, int, int, str, int, str]]:
    """Return what to compile.

    With ``full=True`` every shape, else a set that includes each kernel, both rank classes and
    every target.
    """
    half = ("bfloat16", "float16")
    if full:
        wanted = [("edit", d, r, t) for d in DIMS for r in RANKS for t in (*half, "float32")]
        wanted += [("red", d, 2, t) for d in DIMS for t in (*half, "float32")]
        wanted += [("orthonormal", d, r, "float32") for d in DIMS for r in RANKS]
    else:
        wanted = [("edit", 4096, r, "bfloat16") for r in (8, 32)]
        wanted += [
            ("edit", 768, 4, "bfloat16"),
            ("edit", 5120, 64, "bfloat16"),
            ("red", 4096, 2, "bfloat16"),
        ]
        wanted += [("orthonormal", 4096, 8, "float32")]
    results = []
    for target in targets:
        more = (
            [("edit", 4096, 8, "float32"), ("orthonormal", 5120, 64, "float32")]
            if target == "sm_90" and not full
            else []
        )
        for group, d, r, dtype in (*wanted, *more):
            results += [
                (group, d, r, dtype, i, target)
                for i in range(len(specs(group, d, r, dtype, TARGETS[target][0])))
            ]
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS))
    parser.add_argument("--group", action="append", choices=("edit", "red", "orthonormal"))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    work = [
        j
        for j in jobs(args.full, args.target or list(TARGETS))
        if not args.group or j[0] in args.group
    ]
    with ProcessPoolExecutor(args.workers) as pool:
        for row in pool.map(compile_one, work):
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
