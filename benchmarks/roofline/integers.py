"""Integer and predicate instructions of PTX, on one value for each thread of a program.

Registers of up to 32 bits are int64 arrays with values from 0 to 2^32 - 1; registers of 64 bits are
int64 arrays in two's complement; predicates are bool arrays.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray

_COMPARE: dict[str, Callable] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


class Unsupported(NotImplementedError):
    """An address or a branch depends on an instruction that is not implemented here."""


def bits(kind: str) -> int:
    """Return the width of a type such as ``u32``; 1 for ``pred``."""
    return 1 if kind == "pred" else int(kind.lstrip("busf"))


def signed(value: Array, kind: str) -> Array:
    """Return a register's value as a number of a type."""
    width = bits(kind)
    if width >= 64 or kind[0] != "s":
        return value & ((1 << width) - 1) if width < 64 else value
    sign = 1 << (width - 1)
    return ((value & ((1 << width) - 1)) ^ sign) - sign


def stored(value: Array, width: int) -> Array:
    """Return a number as a register of a width keeps it."""
    return value & ((1 << width) - 1) if width < 64 else value


def _unsigned_order(value: Array, kind: str) -> Array:
    """Return values that compare as unsigned 64-bit numbers do."""
    return value.view(np.uint64) if bits(kind) == 64 and kind[0] == "u" else signed(value, kind)


def _shift(name: str, kind: str, value: Array, count: Array) -> Array:
    width = bits(kind)
    count = np.minimum(signed(count, "u32"), 63)
    if name == "shl":
        return np.where(count >= width, 0, signed(value, kind) << count)
    if kind[0] == "s":
        return signed(value, kind) >> count
    unsigned = value.astype(np.int64).view(np.uint64) if width == 64 else signed(value, "u32")
    shifted = unsigned >> count.astype(unsigned.dtype)
    return shifted.astype(np.int64) if width < 64 else shifted.view(np.int64)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    both = (stored(b, 32).astype(np.uint64) << np.uint64(32)) | stored(a, 32).astype(np.uint64)
    result = np.zeros_like(a)
    for k in range(4):
        choice = (selector >> (4 * k)) & 0xF
        byte = (both >> ((choice & 7) * 8).astype(np.uint64)).astype(np.int64) & 0xFF
        byte = np.where(choice & 8, np.where(byte & 0x80, 0xFF, 0), byte)
        result |= byte << (8 * k)
    return result


def _lop3(a: Array, b: Array, c: Array, table: int) -> Array:
    result = np.zeros_like(a)
    for k in range(8):
        if table >> k & 1:
            result |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return result


def _funnel(parts: list[str], low: Array, high: Array, count: Array) -> Array:
    both = (stored(high, 32) << 32) | stored(low, 32)
    count = count & 31 if "wrap" in parts else np.minimum(stored(count, 32), 32)
    if parts[1] == "l":
        return (both.view(np.uint64) << count.astype(np.uint64) >> np.uint64(32)).astype(np.int64)
    return (both.view(np.uint64) >> count.astype(np.uint64)).view(np.int64)


def compute(opcode: str, sources: list[Array]) -> Array:
    """Return the result of an instruction that has one.

    Args:
        opcode: Opcode with its modifiers.
        sources: Values of the source operands.

    Raises:
        Unsupported: If the instruction is not implemented.
    """
    parts = opcode.split(".")
    name, kind = parts[0], parts[-1]
    if name in ("mov", "cvta"):
        return sources[0]
    if kind[0] not in "busp" or kind not in ("pred",) and not kind[1:].isdigit():
        raise Unsupported(opcode)
    if name == "setp":
        return _compare(parts, sources)
    if name == "selp":
        return np.where(sources[2], sources[0], sources[1])
    if kind == "pred":
        if name == "not":
            return np.logical_not(sources[0])
        return _LOGIC[name](*sources)
    width = bits(kind)
    if name == "cvt":
        # cvt.<to>.<from>
        return stored(signed(sources[0], kind), bits(parts[-2]))
    if name in ("mul", "mad"):
        return _multiply(parts, sources)
    if name in ("shl", "shr"):
        return stored(_shift(name, kind, *sources), width)
    if name == "prmt":
        return _permute(*sources)
    if name == "lop3":
        return stored(_lop3(*sources[:3], int(sources[3].flat[0])), width)
    if name == "shf":
        return stored(_funnel(parts, *sources), width)
    values = [signed(source, kind) for source in sources]
    return stored(_plain(opcode, name, kind, values), width)


def _plain(opcode: str, name: str, kind: str, v: list[Array]) -> Array:
    if name in _BITWISE:
        return _BITWISE[name](*v)
    if name == "bfe":
        position, length = v[1] & 0xFF, v[2] & 0xFF
        field = v[0] >> np.minimum(position, 63) & ((1 << length) - 1)
        if kind[0] == "s":
            sign = 1 << (length - 1)
            field = (field ^ sign) - sign
        return np.where(length == 0, 0, field)
    if name == "bfi":
        mask = ((1 << (v[3] & 0xFF)) - 1) << (v[2] & 0xFF)
        return (v[1] & ~mask) | ((v[0] << (v[2] & 0xFF)) & mask)
    if name in ("div", "rem"):
        divisor = np.where(v[1] == 0, 1, v[1])
        quotient = np.abs(v[0]) // np.abs(divisor) * np.sign(v[0]) * np.sign(divisor)
        return quotient if name == "div" else v[0] - quotient * divisor
    simple: dict[str, Callable] = {
        "add": lambda: v[0] + v[1],
        "sub": lambda: v[0] - v[1],
        "min": lambda: np.minimum(v[0], v[1]),
        "max": lambda: np.maximum(v[0], v[1]),
        "neg": lambda: -v[0],
        "abs": lambda: np.abs(v[0]),
        "not": lambda: ~v[0],
        "popc": lambda: _popcount(v[0]),
        "clz": lambda: bits(kind) - _bit_length(v[0]),
        "bfind": lambda: _bit_length(v[0]) - 1,
        "brev": lambda: _reverse(v[0]),
    }
    if name not in simple:
        raise Unsupported(opcode)
    return simple[name]()


def _popcount(value: Array) -> Array:
    return np.array([int(x & 0xFFFFFFFFFFFFFFFF).bit_count() for x in value.tolist()], np.int64)


def _bit_length(value: Array) -> Array:
    return np.array([int(x).bit_length() for x in value.tolist()], np.int64)


def _reverse(value: Array) -> Array:
    return np.array([int(f"{x & 0xFFFFFFFF:032b}"[::-1], 2) for x in value.tolist()], np.int64)


def _compare(parts: list[str], sources: list[Array]) -> Array:
    kind = parts[-1]
    # unsigned comparisons of untyped bits have their own names
    kind = "u" + kind[1:] if parts[1] in ("lo", "ls", "hi", "hs") else kind
    if kind[0] == "f":
        raise Unsupported(".".join(parts))
    a, b = (_unsigned_order(np.ascontiguousarray(source), kind) for source in sources[:2])
    result = _COMPARE[parts[1]](a, b)
    return _LOGIC[parts[2]](result, sources[2]) if parts[2] in _LOGIC else result


def _multiply(parts: list[str], sources: list[Array]) -> Array:
    kind = parts[-1]
    width = bits(kind)
    a, b = (signed(source, kind) for source in sources[:2])
    if "hi" in parts:
        if width == 64:
            high = [(x * y) >> 64 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
            product = np.array(high, np.int64)
        else:
            product = (a * b) >> width
    else:
        product = a * b  # 64-bit products wrap around, as those of the hardware do
        width = 2 * width if "wide" in parts else width
    if parts[0] == "mad":
        product = product + (sources[2] if width == 64 else signed(sources[2], kind))
    return stored(product, width)
