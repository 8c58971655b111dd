"""What a comparison does: which methods, what each may spend on tuning, which runs are then
tested, in which order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reft_train import tasks
from reft_train.config import METHODS, RunConfig
from reft_train.errors import UserError
from reft_train.search.objective import Objective

DEFAULT = ("loreft", "nodireft", "noreft", "lora", "dora", "prefix", "ia3")


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
        config: settings that all methods share; ``output`` is the comparison's folder. trials: of
        each method's search. seconds: of each method's search; exactly one of the two is None.
        seeds: one tested run of each method for each.
    """

    config: RunConfig
    methods: tuple[str, ...]
    objective: Objective
    seeds: tuple[int, ...] = (42, 43, 44)
    trials: int | None = 8
    seconds: float | None = None
    sampler_seed: int = 0

    @property
    def folder(self) -> Path:
        """Where the comparison leaves its files."""
        return Path(self.config.output)

    def search_config(self, method: str) -> RunConfig:
        """Settings of a method's search, in a folder of its own."""
        output = str(self.folder / "search" / method)
        return self.config.replace(method=method, output=output, resume=False, overwrite=False)

    def final_config(self, best: RunConfig, seed: int) -> RunConfig:
        """Settings of a tested run: the best ones of the method's search, with another seed."""
        output = str(self.folder / "runs" / best.method / f"seed-{seed}")
        return best.replace(seed=seed, output=output, skip_test=False, resume=False, overwrite=True)

    def order(self, methods: Sequence[str]) -> list[tuple[str, int]]:
        """The tested runs, (method, seed), seed by seed, each time another method first: machine
        noise hits all alike.
        """
        count = len(methods)
        return [
            (methods[(place + turn) % count], seed)
            for turn, seed in enumerate(self.seeds)
            for place in range(count)
        ]


def methods_of(config: RunConfig, wish: Sequence[str] | None) -> tuple[str, ...]:
    """The methods to compare; where none are named :data:`DEFAULT`, and the trained head alone for
    a task with classes.

    Raises:
        UserError: an unknown method, or one named twice.
    """
    if wish is None:
        return DEFAULT if tasks.get(config.task).decoding is not None else (*DEFAULT, "head")
    for method in wish:
        if method not in METHODS:
            raise UserError(f"--methods: got {method!r}, expected some of {', '.join(METHODS)}")
    if len(set(wish)) < len(wish):
        raise UserError(f"--methods: got {' '.join(wish)}, expected each method once")
    return tuple(wish)
