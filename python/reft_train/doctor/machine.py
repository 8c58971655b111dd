"""The memory that the machine has, and what of it is free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reft_train.proc import MEMINFO, sizes

_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


@dataclass(frozen=True)
class Memory:
    """Bytes, and where the numbers are from."""

    free: int
    total: int
    source: str


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # cgroup says "max" where there is no limit


def _cpu() -> Memory | None:
    fields = sizes(MEMINFO)
    if not {"MemAvailable", "MemTotal"} <= fields.keys():
        return None
    memory = Memory(fields["MemAvailable"], fields["MemTotal"], "/proc/meminfo")
    for limit_path, used_path in _GROUPS:
        limit, used = _number(limit_path), _number(used_path)
        if limit is not None and used is not None and limit < memory.total:
            return Memory(
                min(memory.free, max(0, limit - used)), limit, "the control group's limit"
            )
    return memory


def memory_of(device: str, spread: bool = False) -> Memory | None:
    """The memory of ``cpu`` or ``cuda``; None where the system does not tell.

    Args:
        spread: sum over all CUDA devices instead of the first.
    """
    if device != "cuda":
        return _cpu()
    import torch

    numbers = range(torch.cuda.device_count()) if spread else [torch.cuda.current_device()]
    pairs = [torch.cuda.mem_get_info(number) for number in numbers]
    return Memory(
        sum(free for free, _ in pairs),
        sum(total for _, total in pairs),
        f"CUDA, {len(pairs)} device(s)",
    )
