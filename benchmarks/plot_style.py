"""Colours, markers and matplotlib settings of the benchmark figures.

A provider has the same colour and marker in every figure.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from benchmarks import compare

# shades by family: providers whose names start alike have similar colours
COLOURS = {
    "reft_kernels": ("#0b5fa5", "#4f9bd9", "#08306b", "#7fb8e6"),
    "eager": ("#e07b00", "#b34700", "#f2b04d", "#8a5a00"),
    "torch.compile": ("#2a8f3c", "#7bbf5a", "#14591f"),
    "pyreft": ("#8e44ad", "#b98ad0"),
    "adapters": ("#c0392b",),
    "householder_product": ("#16a2a2",),
}
FLOORS = dict.fromkeys(compare.FLOORS, "#555555") | {"frozen model": "#9a9a9a"}
SHADES = {
    "reft_kernels": 0,
    "reft_kernels householder": 0,
    "reft_kernels cayley": 1,
    "reft_kernels, torch backend": 1,
    "reft_kernels, triton backend": 2,
    "reft_kernels, cuda backend": 3,
    "eager, unfolded": 0,
    "eager, folded": 1,
    "eager, clone and scatter": 0,
    "eager, in place": 1,
    "eager hooks": 0,
    "eager hooks, cached R": 1,
    "reft_kernels, in adapters": 1,
    "reft_kernels, in pyreft": 3,
    "torch.compile, folded": 0,
    "torch.compile, in place": 0,
}
OTHER_COLOURS = ("#c2358f", "#8c6d31", "#5b5bd6", "#6b8e23")
MARKERS = {
    "reft_kernels": "o",
    "eager": "s",
    "torch.compile": "^",
    "pyreft": "D",
    "adapters": "P",
    "householder_product": "X",
}
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    "svg.hashsalt": "reft_kernels",
    "figure.facecolor": "white",
    "savefig.dpi": 110,
}


def family(provider: str) -> str:
    """Return the start of a provider's name that determines its colours, or the whole name."""
    return next((name for name in COLOURS if provider.startswith(name)), provider)


def colour(provider: str) -> str:
    """Return the colour of a provider."""
    if provider in FLOORS:
        return FLOORS[provider]
    number = SHADES.get(provider, zlib.crc32(provider.encode()))
    shades = COLOURS.get(family(provider), OTHER_COLOURS)
    return shades[number % len(shades)]


def order(providers: Iterable[str]) -> list[str]:
    """Return distinct providers: floors, reft_kernels, then the others by family and name."""
    families = list(COLOURS)

    def place(name: str) -> tuple[bool, int, int, str]:
        group = family(name)
        return (
            name not in FLOORS,
            families.index(group) if group in families else len(families),
            SHADES.get(name, 99),
            name,
        )

    return sorted(set(providers), key=place)
