"""Recipes: the paper's settings for its four benchmarks, and defaults for custom data.

Source: Wu et al. 2024, "ReFT: Representation Finetuning for Language Models" (arXiv:2404.03592).
For GLUE the paper tuned each task and model within ranges (first 1, 3 or 11 positions, learning
rates 1e-4 to 9e-4, 20 to 60 epochs, dropout 0.05 to 0.2). The recipe uses values within these
ranges; ``search`` can find better ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reft_train.errors import wrong
from reft_train.tasks import glue

_SHARED = {"warmup": 0.1, "dropout": 0.0, "schedule": "linear", "weight_decay": 0.0}
_COMMONSENSE = _SHARED | {"layers": "all", "rank": 8, "positions": "f7+l7", "share_weights": True}
_COMMONSENSE |= {"lr": 9e-4, "epochs": 6, "batch_size": 16, "accumulation": 2, "max_length": 512}
_INSTRUCT = {"layers": [3, 9, 18, 24], "rank": 4, "positions": "f5+l5", "share_weights": False}
_INSTRUCT |= {"epochs": 9, "batch_size": 4, "accumulation": 32, "max_length": 768}
_GLUE = {"rank": 1, "positions": "f1", "lr": 6e-4, "epochs": 40, "batch_size": 32, "dropout": 0.05}
_GLUE |= {"accumulation": 1, "max_length": 256, "select": "metric"}
# defaults of the paper's training script
_SCRIPT = {"layers": [2, 10, 18, 26], "positions": "f1+l1", "lr": 5e-3, "epochs": 1}
_SCRIPT |= {"batch_size": 4, "accumulation": 4, "warmup": 0.0}

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "commonsense": _COMMONSENSE,
    "math": _COMMONSENSE | {"epochs": 12},
    "gsm8k": _COMMONSENSE | {"epochs": 12},
    "instruct": _COMMONSENSE | _INSTRUCT,
    **{f"glue/{name}": _COMMONSENSE | _GLUE for name in glue.SETS},
    "script": _COMMONSENSE | _SCRIPT,
    "default": _COMMONSENSE | {"epochs": 3},
}


def recipe(name: str) -> Mapping[str, Any]:
    if name not in RECIPES:
        raise wrong("recipe", repr(name), f"one of {', '.join(RECIPES)}")
    return RECIPES[name]
