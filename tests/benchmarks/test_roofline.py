"""The parts of ``benchmarks.roofline``: reading of code, execution of PTX, the model and the command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.roofline import (
    amdgcn,
    code,
    execution,
    integers,
    native_steps,
    ptx,
    reading,
    sass,
    shapes,
    steps,
    traces,
)

ROOT = Path(__file__).parents[2]

# Each thread adds every 64th word of a row, loads it from x[rows[program]] and stores one sum
PTX = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry sum_row(
    .param .u64 .ptr .global .align 1 sum_row_param_0,
    .param .u64 .ptr .global .align 1 sum_row_param_1,
    .param .u64 .ptr .global .align 1 sum_row_param_2,
    .param .u32 sum_row_param_3
)
.reqntid 64
{
    .reg .pred  %p<4>;
    .reg .b32   %r<10>;
    .reg .b64   %rd<10>;
    ld.param.b64 %rd1, [sum_row_param_0];
    ld.param.b64 %rd2, [sum_row_param_1];
    ld.param.b64 %rd3, [sum_row_param_2];
    ld.param.b32 %r1, [sum_row_param_3];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %tid.x;
    mul.wide.s32 %rd4, %r2, 4;
    add.s64 %rd5, %rd2, %rd4;
    ld.global.b32 %r4, [%rd5];          // rows[program]
    mul.lo.s32 %r5, %r4, %r1;
    add.s32 %r6, %r3, %r5;
    mul.wide.s32 %rd6, %r6, 4;
    add.s64 %rd7, %rd1, %rd6;
    mov.b32 %r7, %r3;
$loop:
    ld.global.b32 %r8, [%rd7];
    add.f32 %r9, %r9, %r8;
    add.s64 %rd7, %rd7, 256;
    add.s32 %r7, %r7, 64;
    setp.lt.s32 %p1, %r7, %r1;
    @%p1 bra $loop;
    setp.ne.s32 %p2, %r3, 0;
    @%p2 bra $end;
    add.s64 %rd8, %rd3, %rd4;
    st.global.b32 [%rd8], %r9;
$end:
    ret;
}
"""

SASS = """
.text.sum_row:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/              @!P1 LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0040*/                   F2FP.BF16.F32.PACK_AB R4, RZ, R5 ;
        /*0050*/                   F2FP.BF16.F32.PACK_AB R4, R6, R5 ;
.L_x_2:
        /*0060*/                   STL.64 [R1], R4 ;
        /*0070*/              @P0  BRA `(.L_x_2) ;
        /*0080*/              @P2  BRA `(.L_x_1) ;
        /*0090*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
        /*00c0*/                   NOP;
"""


def _machine(words: int, rows: np.ndarray, threads: int = 64) -> execution.Machine:
    kernel = ptx.parse(PTX)["sum_row"]
    addresses = (1 << 20, 1 << 30, 1 << 31)
    buffers = [
        traces.Buffer("x", addresses[0], 16 * words * 4),
        traces.Buffer("rows", addresses[1], 4 * len(rows), rows.view(np.uint8)),
        traces.Buffer("out", addresses[2], 4 * len(rows)),
    ]
    arguments = b"".join(a.to_bytes(8, "little") for a in addresses)
    arguments += words.to_bytes(4, "little")
    return execution.Machine(kernel, arguments, buffers, threads, (len(rows), 1, 1))


def test_execution_follows_addresses_loops_and_divergence():
    words, rows = 640, np.array([3, 7], np.int32)
    machine = _machine(words, rows)
    for program in range(2):
        trace = machine.run((program, 0, 0))
        loads = {a.buffer: a for a in trace.accesses.values() if a.kind == "load"}
        store = next(a for a in trace.accesses.values() if a.kind == "store")
        x = loads["x"]
        first = ((1 << 20) + rows[program] * words * 4) // 32
        assert x.touched == set(range(first, first + words * 4 // 32))
        assert (x.requested, x.sectors * 32, x.width) == (words * 4, words * 4, 4)
        assert x.requests == 2 * words // 64  # of two warps
        # one thread stores; the other warp has left
        assert (store.requests, store.requested) == (1, 4)


def test_an_address_that_depends_on_unknown_contents_is_an_error():
    machine = _machine(64, np.array([1], np.int32))
    machine.buffers[1] = traces.Buffer("rows", 1 << 30, 4)
    with pytest.raises(integers.Unsupported, match="not known"):
        machine.run((0, 0, 0))


def test_an_access_out_of_bounds_is_an_error():
    with pytest.raises(IndexError, match="no argument's memory|out of bounds"):
        _machine(640, np.array([16], np.int32)).run((0, 0, 0))


def test_loops_of_machine_code_are_counted():
    region = reading.read(sass.parse(SASS))
    (outer,) = region.inner
    (inner,) = outer.inner
    assert (region.instructions, outer.instructions, inner.instructions) == (3, 6, 2)
    assert (outer.barriers, outer.loads, region.stores) == (1, {16: 1, 2: 1}, {8: 1})
    assert (outer.scalar_conversions, outer.packed_conversions) == (1, 1)
    assert (inner.local, reading.total(region, "local")) == (8, 8)


def test_amd_assembly_is_read():
    text = """
_Z6kernel:
\ts_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:                                ; %loop
\tglobal_load_dwordx4 v[0:3], v4, s[0:1] ; comment
\tv_cvt_f32_f16_e32 v0, v1
\ts_barrier
\ts_cbranch_scc1 .LBB0_1
\tbuffer_store_short v0, v1, s[0:3], 0 offen
\ts_endpgm
\t.section\t.rodata
"""
    region = reading.read(amdgcn.parse(text))
    (loop,) = region.inner
    assert (loop.loads, loop.barriers, loop.scalar_conversions) == ({16: 1}, 1, 1)
    assert region.stores == {2: 1}


def test_loops_of_machine_code_get_the_iterations_of_their_ptx():
    """Here the assembler has unrolled the loop twice."""
    kernel = ptx.parse(PTX)["sum_row"]
    trace = _machine(640, np.array([1], np.int32)).run((0, 0, 0))
    unrolled = reading.Region(instructions=12)
    unrolled.loads[4] = 2
    region = reading.Region(instructions=20, inner=[unrolled])
    found = steps.steps(kernel, region, trace)
    assert [step.iterations for step in found] == [1, 5]


def test_a_loop_without_counterpart_is_an_error():
    kernel = ptx.parse(PTX)["sum_row"]
    trace = _machine(640, np.array([1], np.int32)).run((0, 0, 0))
    other = reading.Region(instructions=12)
    other.stores[4] = 3
    loop = reading.Region(instructions=9)
    loop.loads[4] = 1
    with pytest.raises(ValueError, match="no counterpart"):
        steps.steps(kernel, reading.Region(inner=[loop, other]), trace)


def test_instructions_know_their_line_of_the_ptx():
    lines = PTX.splitlines()
    for instruction in ptx.parse(PTX)["sum_row"].code.instructions:
        assert instruction.opcode in lines[instruction.line - 1]


def test_machine_code_is_counted_as_often_as_its_line_of_the_ptx():
    """A loop of ten iterations that the assembler has unrolled twice; the store is of one warp."""
    kernel = ptx.parse(PTX)["sum_row"]
    trace = _machine(640, np.array([1], np.int32)).run((0, 0, 0))
    lines = {i.opcode: i.line for i in kernel.code.instructions}
    load, store = lines["ld.global.b32"], lines["st.global.b32"]

    def at(line: int) -> str:
        return f'\t//## File ".nv_debug_ptx_txt", line {line}'

    text = "\n".join(
        [
            ".L_x_1:",
            at(load),
            "        /*0000*/                   LDG.E R4, desc[UR4][R2.64] ;",
            "        /*0010*/                   LDG.E R5, desc[UR4][R2.64+0x100] ;",
            "        /*0020*/              @P0  BRA `(.L_x_1) ;",
            at(store),
            "        /*0030*/                   STG.E desc[UR4][R2.64], R4 ;",
            "        /*0040*/                   EXIT ;",
        ]
    )
    straight, loop = native_steps.steps(sass.parse(text), kernel, trace)
    assert (loop.iterations, loop.region.loads) == (5, {4: 2})
    assert straight.region.stores == {4: 0.5}


def test_natural_loops_nest():
    graph = code.blocks(sass.parse(SASS))
    (outer,) = code.loops(graph)
    assert len(outer.inner) == 1 and outer.inner[0].blocks < outer.blocks


@pytest.mark.parametrize(
    "opcode, sources, expected",
    [
        ("add.s32", (0xFFFFFFFF, 1), 0),
        ("sub.s64", (1, 3), -2),
        ("mul.wide.s32", (0xFFFFFFFF, 5), -5),
        ("mul.wide.u32", (0xFFFFFFFF, 5), 0xFFFFFFFF * 5),
        ("mul.hi.u32", (0xFFFFFFFF, 16), 15),
        ("mad.lo.s32", (3, 5, 0xFFFFFFFF), 14),
        ("shr.s32", (0x80000000, 4), 0xF8000000),
        ("shr.u32", (0x80000000, 4), 0x08000000),
        ("shl.b32", (1, 32), 0),
        ("cvt.s64.s32", (0xFFFFFFFE,), -2),
        ("cvt.u64.u32", (0xFFFFFFFE,), 0xFFFFFFFE),
        ("cvt.u16.u32", (0x12345,), 0x2345),
        ("bfe.u32", (0xABCD, 4, 8), 0xBC),
        ("bfe.s32", (0x40, 6, 1), 0xFFFFFFFF),
        ("bfi.b32", (0x3, 0xF0, 0, 2), 0xF3),
        ("div.s32", (0xFFFFFFF9, 2), 0xFFFFFFFD),
        ("rem.s32", (0xFFFFFFF9, 2), 0xFFFFFFFF),
        ("prmt.b32", (0x03020100, 0x07060504, 0x7410), 0x07040100),
        ("lop3.b32", (0b1100, 0b1010, 0b0001, 0x80), 0),
        ("lop3.b32", (0b1100, 0b1010, 0b0001, 0xFE), 0b1111),
        ("shf.l.wrap.b32", (0x80000000, 1, 1), 3),
        ("min.s32", (0xFFFFFFFF, 1), 0xFFFFFFFF),
        ("max.u32", (0xFFFFFFFF, 1), 0xFFFFFFFF),
        ("clz.b32", (1,), 31),
        ("popc.b32", (0xF0F,), 8),
        ("brev.b32", (1,), 0x80000000),
        ("setp.lt.s32", (0xFFFFFFFF, 0), True),
        ("setp.lt.u32", (0xFFFFFFFF, 0), False),
        ("setp.lo.u64", (1, -1), True),
        ("setp.ge.and.s32", (1, 1, False), False),
        ("selp.b32", (1, 2, False), 2),
    ],
)
def test_integer_instructions(opcode, sources, expected):
    values = [np.array([s], bool if isinstance(s, bool) else np.int64) for s in sources]
    assert integers.compute(opcode, values).tolist() == [expected]


@pytest.mark.parametrize("opcode", ("add.f32", "ex2.approx.f32", "fma.rn.f64"))
def test_floating_point_is_not_computed(opcode):
    with pytest.raises(integers.Unsupported):
        integers.compute(opcode, [np.zeros(1, np.int64)] * 3)


def _run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.roofline", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "python")))}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )


@pytest.mark.slow
def test_the_command_prints_estimates():
    pytest.importorskip("triton", reason="needs the package triton")
    done = _run(
        "--d",
        "512",
        "--rank",
        "4",
        "--rows",
        "64",
        "2048",
        "--operator",
        "edit",
        "--backend",
        "triton",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0] == "ESTIMATES, d = 512, r = 4, bfloat16"
    assert "ESTIMATE us" in lines[2]
    assert [line.split("  ")[0] for line in lines[3:5]] == ["edit", "edit"]
    assert "not measurements" in done.stdout


def test_bad_arguments_are_errors():
    pytest.importorskip("triton", reason="needs the package triton")
    for arguments, text in (
        (("--d", "8", "--rank", "16"), "--rank: got 16, expected at most d = 8"),
        (("--rows", "0"), "got 0, expected at least 1"),
    ):
        done = _run(*arguments)
        assert done.returncode == 2 and text in done.stderr


def test_selected_rows_are_asked_at_wide_ranks_too():
    pytest.importorskip("triton", reason="needs the package triton")
    asked = shapes.wide_questions(4096, 32, torch.bfloat16, "triton")
    state = 448 * 4096 * 2
    assert [(q.operator, q.shape, q.ideal_bytes) for q in asked[2:]] == [
        ("edit", "448 selected rows, r = 64", 3 * state),
        ("edit backward", "448 selected rows, r = 64", 3 * state),
    ]
