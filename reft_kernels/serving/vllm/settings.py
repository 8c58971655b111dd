"""The plugin's settings, in vLLM's ``additional_config``. Importing this needs no vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from reft_kernels.checks import check_count, describe
from reft_kernels.orthonormal import MAX_RANK
from reft_kernels.serving.errors import AdapterError
from reft_kernels.version import __version__

KEY = "reft"
WORKER = "reft_kernels.serving.vllm.worker.ReftWorker"
SCHEDULER = "reft_kernels.serving.vllm.scheduler.ReftScheduler"
_FIELDS = ("slots", "max_rank", "adapters", "version")


class Source(NamedTuple):
    """Where an adapter is read from."""

    folder: str
    positions: str | None = None


class Settings(NamedTuple):
    """The settings.

    Attributes:
        slots: Number of weight sets on the device: of adapters whose prompts one step computes.
        max_rank: The largest rank.
        adapters: Adapters to load at the start, by name.
    """

    slots: int
    max_rank: int
    adapters: dict[str, Source]


def _source(name: object, value: object) -> Source:
    if not isinstance(name, str) or not name:
        raise AdapterError(f"adapters: got the name {name!r}, expected a string")
    if isinstance(value, str | Path):
        return Source(str(value))
    if isinstance(value, Mapping) and isinstance(value.get("folder"), str | Path):
        unknown = sorted(set(value) - {"folder", "positions"})
        positions = value.get("positions")
        if not unknown and (positions is None or isinstance(positions, str)):
            return Source(str(value["folder"]), positions)
    raise AdapterError(
        f"adapters: got {describe(value)} for {name!r}, expected a folder, or an object with "
        "'folder' and 'positions'"
    )


def parse(value: object) -> Settings:
    """Check and return the settings in ``additional_config["reft"]``.

    Raises:
        ValueError: If they are malformed.
    """
    if not isinstance(value, Mapping):
        raise AdapterError(f"{KEY}: got {describe(value)}, expected an object")
    unknown = sorted(set(map(str, value)) - set(_FIELDS))
    if unknown:
        raise AdapterError(f"{KEY}: got unknown settings {unknown}, expected {', '.join(_FIELDS)}")
    adapters = value.get("adapters") or {}
    if not isinstance(adapters, Mapping):
        raise AdapterError(f"adapters: got {describe(adapters)}, expected folders by name")
    return Settings(
        check_count("slots", value.get("slots", 8), 1, None),
        check_count("max_rank", value.get("max_rank", 16), 1, MAX_RANK),
        {name: _source(name, source) for name, source in adapters.items()},
    )


def engine_arguments(
    adapters: Mapping[str, str | Path | Mapping[str, Any]] | None = None,
    *,
    slots: int = 8,
    max_rank: int = 16,
) -> dict[str, Any]:
    """Return keyword arguments of ``vllm.LLM`` and of ``EngineArgs`` that serve ReFT adapters.

    Args:
        adapters: Folders by adapter name; or objects with "folder" and "positions", which a pyreft
            folder does not hold. More can be loaded while the engine runs.
        slots: Number of adapters on the device. More can be loaded; a step computes prompts of at
            most this many. Adapters with separate weights for first and last positions take two.
        max_rank: The largest rank that will be loaded.

    Raises:
        ValueError: If an argument is out of range or malformed.
    """
    settings = parse({"slots": slots, "max_rank": max_rank, "adapters": adapters})
    listed = {
        name: source.folder if source.positions is None else source._asdict()
        for name, source in settings.adapters.items()
    }
    return {
        "worker_cls": WORKER,
        "scheduler_cls": SCHEDULER,
        "additional_config": {
            KEY: {
                "slots": slots,
                "max_rank": max_rank,
                "adapters": listed,
                "version": __version__,  # a part of the key of compiled graphs
            }
        },
    }


def of(vllm_config: Any) -> Settings:
    """Return the settings of an engine.

    Raises:
        ValueError: If it has none, or they are malformed.
    """
    config = vllm_config.additional_config
    if not isinstance(config, dict) or KEY not in config:
        raise AdapterError(
            f"additional_config: got no {KEY!r}, expected the arguments of "
            "reft_kernels.serving.vllm.engine_arguments"
        )
    return parse(config[KEY])
