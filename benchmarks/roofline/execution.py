"""Execution of one program of a PTX kernel, for its branches and its memory accesses.

Only instructions that an address, a branch or a predicate depends on are computed; all others are
counted. Floating-point values and the contents of floating-point tensors are unknown; it is an
error if an address or a branch depends on an unknown value. Threads that diverge are executed from
the lowest address on.
"""

from __future__ import annotations

import re

import numpy as np

from benchmarks.roofline.code import Instruction
from benchmarks.roofline.dependence import Slice, memory_access, names, written
from benchmarks.roofline.integers import Unsupported, bits, compute, signed, stored
from benchmarks.roofline.ptx import Kernel, split
from benchmarks.roofline.traces import SECTOR, Access, Buffer, Trace

_ADDRESS = re.compile(r"\[\s*([^\]]+?)\s*\]")
_SIZES = {"v2": 2, "v4": 4, "v8": 8}
_MAX_STEPS = 20_000_000
SHARED_WINDOW = 1 << 60  # generic address of the first byte of shared memory


class Machine:
    """The state of one program."""

    def __init__(
        self,
        kernel: Kernel,
        arguments: bytes,
        buffers: list[Buffer],
        threads: int,
        grid: tuple[int, int, int],
        arrived: int = 0,
    ) -> None:
        """Prepare programs of a launch.

        Args:
            kernel: The kernel.
            arguments: Its parameters as the launch passes them.
            buffers: Memory of all pointer arguments.
            threads: Threads of a program.
            grid: Number of programs on each axis.
            arrived: Value that every atomic operation on global memory returns.
        """
        self.kernel, self.arguments, self.buffers = kernel, arguments, buffers
        self.threads, self.grid, self.arrived = threads, grid, arrived
        self.offsets: dict[str, int] = {}
        at = 0
        for parameter in kernel.parameters:
            align = 8 if parameter.size > 8 else parameter.size
            at = -(-at // align) * align
            self.offsets[parameter.name] = at
            at += parameter.size
        self.slice = Slice(kernel)
        self.memory = [memory_access(i) for i in kernel.code.instructions]
        self.needed = [self.slice.needs(i) for i in kernel.code.instructions]
        self.names = dict.fromkeys(kernel.shared, 0)
        at = 0
        for name, size in kernel.shared.items():
            self.names[name] = at
            at += -(-size // 128) * 128
        self.names |= self.offsets

    def run(self, program: tuple[int, int, int]) -> Trace:
        """Execute one program.

        Raises:
            Unsupported: If an address or a branch depends on an instruction that is not
                implemented, or on the content of a buffer that has none.
        """
        instructions, labels = self.kernel.code.instructions, self.kernel.code.labels
        lanes = np.arange(self.threads, dtype=np.int64)
        self.special = {
            "%tid.x": lanes,
            "%tid.y": 0 * lanes,
            "%tid.z": 0 * lanes,
            "%laneid": lanes % 32,
            "%warpid": lanes // 32,
            "%ntid.x": 0 * lanes + self.threads,
        }
        for axis, here, size in zip("xyz", program, self.grid, strict=True):
            self.special[f"%ctaid.{axis}"] = 0 * lanes + here
            self.special[f"%nctaid.{axis}"] = 0 * lanes + size
        self.values: dict[str, np.ndarray] = {}
        self.unknown: set[str] = set()
        self.shared_bytes = np.zeros(256 * 1024, np.uint8)
        self.shared_unknown = np.zeros(256 * 1024, bool)
        warps = -(-self.threads // 32)
        trace = Trace(np.zeros(len(instructions), np.int64), {}, warps)
        where = np.zeros(self.threads, np.int64)
        end = len(instructions)
        self.active = np.ones(self.threads, bool)
        whole = True
        at = 0
        for _ in range(_MAX_STEPS):
            if at >= end:
                return trace
            instruction = instructions[at]
            if whole:
                self.active = np.ones(self.threads, bool)
                trace.counts[at] += warps
            else:
                self.active = where == at
                trace.counts[at] += len(np.unique(np.flatnonzero(self.active) // 32))
            follow = at + 1
            name = instruction.opcode.split(".")[0]
            if name in ("bra", "ret", "exit", "trap"):
                taken = self.active & self._known_guard(instruction)
                target = labels[instruction.label] if name == "bra" else end
                if whole and taken.all():
                    at = target
                    continue
                if whole and not taken.any():
                    at = follow
                    continue
                if whole:
                    where[:] = at
                where[self.active] = follow
                where[taken] = target
            else:
                access = self.memory[at]
                if access is not None:
                    self._access(at, instruction, access, trace)
                elif self.needed[at]:
                    self._compute(instruction)
                if whole:
                    at = follow
                    continue
                where[self.active] = follow
            at = int(where.min())
            whole = bool((where == at).all())
        raise Unsupported(f"{self.kernel.name}: more than {_MAX_STEPS} steps")

    def _guard(self, instruction: Instruction) -> np.ndarray:
        if not instruction.guard:
            return np.ones(self.threads, bool)
        value = self._value(instruction.guard.lstrip("!"))
        return ~value if instruction.guard[0] == "!" else value

    def _known_guard(self, instruction: Instruction) -> np.ndarray:
        self._require(instruction, instruction.guard)
        return self._guard(instruction)

    def _require(self, instruction: Instruction, operand: str) -> None:
        if not self.unknown.isdisjoint(names(operand)):
            raise Unsupported(
                f"{self.kernel.name}: {instruction.opcode} depends on {operand}, whose value is "
                "not known"
            )

    def _value(self, operand: str) -> np.ndarray:
        if operand in self.special:
            return self.special[operand]
        if operand.startswith("!"):
            return ~self._value(operand[1:])
        if operand.startswith("%"):
            if operand not in self.values:
                # Not written on this path; its value cannot matter
                zero = np.zeros(self.threads, bool if operand.startswith("%p") else np.int64)
                self.values[operand] = zero
            return self.values[operand]
        if operand in self.names:
            return np.full(self.threads, self.names[operand], np.int64)
        if operand.startswith("0f"):
            return np.full(self.threads, int(operand[2:], 16), np.int64)
        try:
            number = int(operand.rstrip("U"), 0)
        except ValueError:
            raise Unsupported(f"operand {operand}") from None
        return np.full(self.threads, (number + 2**63) % 2**64 - 2**63, np.int64)

    def _set(
        self, register: str, value: np.ndarray, active: np.ndarray, known: bool = True
    ) -> None:
        if register == "_":
            return
        if not known:
            self.unknown.add(register)
        elif active.all():
            self.unknown.discard(register)
        if not active.all():
            value = np.where(active, value, self._value(register))
        self.values[register] = value

    def _compute(self, instruction: Instruction) -> None:
        operands = " ".join((instruction.guard, *instruction.operands[1:]))
        if self.unknown.isdisjoint(names(operands)):
            try:
                self._compute_known(instruction)
                return
            except Unsupported:
                pass
        everywhere = np.ones(self.threads, bool)
        for register in written(instruction):
            kind = bool if register.startswith("%p") else np.int64
            self._set(register, np.zeros(self.threads, kind), everywhere, known=False)

    def _compute_known(self, instruction: Instruction) -> None:
        active = self.active & self._guard(instruction)
        parts = instruction.opcode.split(".")
        to, sources = instruction.operands[0], instruction.operands[1:]
        if parts[0] == "ld":  # ld.param
            width = bits(parts[-1])
            for k, register in enumerate(split(to.strip("{} "))):
                self._set(register, self._parameter(sources[0], k * width // 8, width), active)
        elif parts[0] == "mapa":  # shared memory of another block of the cluster
            self._set(to, self._value(sources[0]), active)
        elif parts[0] == "cvta" and "shared" in parts:
            window = -SHARED_WINDOW if parts[1] == "to" else SHARED_WINDOW
            self._set(to, self._value(sources[0]) + window, active)
        elif parts[0] == "shfl":
            self._shuffle(to, parts, sources, active)
        elif parts[0] in ("vote", "match", "elect", "redux", "mbarrier"):
            self._collective(to, instruction, active)
        elif parts[0] == "mov" and "{" in to + sources[0]:
            self._pack(to, sources[0], bits(parts[-1]), active)
        else:
            values = [self._value(source) for source in sources]
            first, _, second = to.partition("|")
            result = compute(instruction.opcode, values)
            self._set(first, result, active)
            if second:
                self._set(second, ~result, active)

    def _pack(self, to: str, source: str, width: int, active: np.ndarray) -> None:
        if "{" in source:
            parts = split(source.strip("{} "))
            each = width // len(parts)
            value = sum(stored(self._value(p), each) << (k * each) for k, p in enumerate(parts))
            self._set(to, value, active)
        else:
            parts = split(to.strip("{} "))
            each = width // len(parts)
            value = self._value(source)
            for k, part in enumerate(parts):
                self._set(part, stored(value >> (k * each), each), active)

    def _parameter(self, operand: str, more: int, width: int) -> np.ndarray:
        at = int(self._address(operand)[0]) + more  # all threads load the same parameter
        number = int.from_bytes(self.arguments[at : at + width // 8], "little")
        number = (number + 2**63) % 2**64 - 2**63
        return np.full(self.threads, number, np.int64)

    def _shuffle(self, to: str, parts: list[str], sources: tuple, active: np.ndarray) -> None:
        value, by, clamp = (self._value(source) for source in sources[:3])
        lane = np.arange(self.threads) % 32
        mode = next(p for p in parts if p in ("up", "down", "bfly", "idx"))
        segment = clamp >> 8 & 0x1F
        high = (lane & segment) | (clamp & 0x1F & ~segment)
        from_lane = {
            "up": lane - by,
            "down": lane + by,
            "bfly": lane ^ by,
            "idx": (lane & segment) | (by & ~segment & 0x1F),
        }[mode]
        inside = from_lane >= (clamp & 0x1F) if mode == "up" else from_lane <= high
        inside = inside & (from_lane >= 0) if mode == "up" else inside
        from_lane = np.where(inside, from_lane, lane)
        first, _, second = to.partition("|")
        position = np.minimum(np.arange(self.threads) - lane + from_lane, self.threads - 1)
        self._set(first, value[position], active)
        if second:
            self._set(second, inside, active)

    def _collective(self, to: str, instruction: Instruction, active: np.ndarray) -> None:
        parts = instruction.opcode.split(".")
        if parts[0] == "mbarrier" and "try_wait" in parts or "test_wait" in parts:
            self._set(to, np.ones(self.threads, bool), active)
            return
        if parts[0] == "elect":
            _, _, predicate = to.partition("|")
            self._set(predicate, np.arange(self.threads) % 32 == 0, active)
            return
        value = self._value(instruction.operands[1])
        result = np.zeros(self.threads, value.dtype if parts[0] == "redux" else np.int64)
        for start in range(0, self.threads, 32):
            lanes = slice(start, min(start + 32, self.threads))
            here = value[lanes][active[lanes]]
            if not here.size:
                continue
            if parts[0] == "redux":
                work = {"add": np.sum, "min": np.min, "max": np.max, "or": np.bitwise_or.reduce}
                work |= {"and": np.bitwise_and.reduce}
                result[lanes] = stored(work[parts[2]](signed(here, parts[-1])), 32)
            elif "ballot" in parts:
                voted = value[lanes] & active[lanes]
                result[lanes] = sum(1 << k for k, yes in enumerate(voted) if yes)
            elif "any" in parts:
                result[lanes] = here.any()
            elif "all" in parts:
                result[lanes] = here.all()
            else:
                raise Unsupported(instruction.opcode)
        boolean = parts[0] == "vote" and "ballot" not in parts
        self._set(to, result.astype(bool) if boolean else result, active)

    def _address(self, operand: str) -> np.ndarray:
        found = _ADDRESS.search(operand)
        text = found[1] if found else operand
        base, _, more = text.partition("+")
        return self._value(base.strip()) + int(more.strip() or "0", 0)

    def _copy(
        self,
        instruction: Instruction,
        width: int,
        address: np.ndarray,
        executed: np.ndarray,
        active: np.ndarray,
    ) -> None:
        """Copy to shared memory; executing threads whose source is masked write zeros."""
        whole = self._known_address(instruction, 0)
        target = whole[executed]
        for byte in range(width):
            self.shared_bytes[target + byte] = 0
            self.shared_unknown[target + byte] = False
        if not active.any():
            return
        buffer = self._buffer(int(address[active][0]))
        place, start = whole[active], address[active] - buffer.address
        for byte in range(width):
            if buffer.content is None:
                self.shared_unknown[place + byte] = True
            else:
                self.shared_bytes[place + byte] = buffer.content[start + byte]

    def _known_address(self, instruction: Instruction, position: int) -> np.ndarray:
        self._require(instruction, instruction.operands[position])
        return self._address(instruction.operands[position])

    def _access(self, at: int, instruction: Instruction, access, trace: Trace) -> None:
        kind, space = access
        parts = instruction.opcode.split(".")
        if space == "shared":
            self._shared(instruction, kind)
            return
        if space == "generic" and kind in ("load", "store"):
            self._require(instruction, instruction.operands[kind == "load"])
            if (self._address(instruction.operands[kind == "load"]) >= SHARED_WINDOW).any():
                self._shared(instruction, kind, SHARED_WINDOW)
                return
        if space in ("local", "const"):
            if self.needed[at]:
                raise Unsupported(instruction.opcode)
            return
        active = executed = self.active & self._known_guard(instruction)
        if kind == "copy":
            width = int(instruction.operands[2], 0)
            address = self._known_address(instruction, 1)
            if len(instruction.operands) > 3:
                self._require(instruction, instruction.operands[3])
                active = active & (self._value(instruction.operands[3]) > 0)
        else:
            size = next((_SIZES[p] for p in parts if p in _SIZES), 1)
            width = size * bits(parts[-1]) // 8
            position = 0 if kind == "store" or parts[0] == "red" else 1
            address = self._known_address(instruction, position)
        if active.any():
            self._record(at, kind, width, address, active, trace)
        if kind == "copy" and self.slice.shared:
            self._copy(instruction, width, address, executed, active)
        if kind == "atomic" and parts[0] == "atom" and self.needed[at]:
            self._set(
                instruction.operands[0], np.full(self.threads, self.arrived, np.int64), active
            )
        elif kind == "load" and self.needed[at]:
            self._load(instruction.operands[0], bits(parts[-1]) // 8, address, active)

    def _buffer(self, address: int) -> Buffer:
        for buffer in self.buffers:
            if buffer.address <= address < buffer.address + max(buffer.size, 1):
                return buffer
        raise IndexError(f"{self.kernel.name}: address {address:#x} is in no argument's memory")

    def _record(self, at, kind, width, address, active, trace) -> None:
        buffer = self._buffer(int(address[active][0]))
        used = address[active]
        if used.min() < buffer.address or used.max() + width > buffer.address + buffer.size:
            raise IndexError(
                f"{self.kernel.name}: an access of {width} bytes to {buffer.name} is out of bounds"
            )
        entry = trace.accesses.setdefault(at, Access(buffer.name, kind, width))
        warp = np.flatnonzero(active) // 32
        sectors = [used // SECTOR, (used + width - 1) // SECTOR]
        of_warp = np.unique(np.concatenate([(warp << 48) + s for s in sectors]))
        entry.requests += len(np.unique(warp))
        entry.requested += width * len(used)
        entry.sectors += len(of_warp)
        entry.touched.update((of_warp & ((1 << 48) - 1)).tolist())

    def _load(self, to: str, width: int, address: np.ndarray, active: np.ndarray) -> None:
        registers = split(to.strip("{} ")) if "{" in to else (to,)
        if not active.any():
            return
        buffer = self._buffer(int(address[active][0]))
        for k, register in enumerate(registers):
            if buffer.content is None:
                self._set(register, np.zeros(self.threads, np.int64), active, known=False)
                continue
            start = np.where(active, address - buffer.address + k * width, 0)
            self._set(register, _gather(buffer.content, start, width), active)

    def _shared(self, instruction: Instruction, kind: str, window: int = 0) -> None:
        if not self.slice.shared:
            return
        if kind == "atomic":
            raise Unsupported(instruction.opcode)
        active = self.active & self._known_guard(instruction)
        width = bits(instruction.opcode.split(".")[-1]) // 8
        position = 1 if kind == "load" else 0
        start = np.where(active, self._known_address(instruction, position) - window, 0)
        for k, register in enumerate(split(instruction.operands[1 - position].strip("{} "))):
            place = start + k * width
            if kind == "load":
                known = not self.shared_unknown[place[active]].any()
                self._set(register, _gather(self.shared_bytes, place, width), active, known)
                continue
            value, used = self._value(register)[active], place[active]
            for byte in range(width):
                self.shared_bytes[used + byte] = value >> (8 * byte) & 0xFF
                self.shared_unknown[used + byte] = register in self.unknown


def _gather(content: np.ndarray, start: np.ndarray, width: int) -> np.ndarray:
    value = np.zeros(len(start), np.int64)
    for byte in range(width):
        value |= content[start + byte].astype(np.int64) << (8 * byte)
    return value
