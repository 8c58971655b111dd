"""What a training step is held to before it is timed: loss and gradients of W of plain PyTorch
in fp64.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import edits, models
from benchmarks.harness import Verdict
from benchmarks.models import Batch, Packed, Shape, Stepper

Build = Callable[..., Stepper]


class StepGate:
    """Loss and gradients of W against plain PyTorch in fp64, on the model cut to two layers,
    nothing switched on.

    Allowed are 16 units of the dtype's precision over the largest exact value, or twice the error
    of forward hooks in plain PyTorch in the same dtype, whichever is more.

    Args:
        batch: what the exact step and the hooks are given.

    Attributes:
        shape, model, weights: the cut model, frozen, and R, W, b of its layers.
    """

    def __init__(self, shape: Shape, device: str, batch: Batch) -> None:
        self.shape = dataclasses.replace(shape.cut(2), checkpointing=False, compiled=False)
        self.model, self.weights = (
            models.llama(self.shape, device),
            models.weights(self.shape, device),
        )
        self.batch = batch
        exact = copy.deepcopy(self.model).double()
        self._exact = self._results(models.by_hooks(exact, self.shape, self.weights), batch)
        rounding = edits.EPS * torch.finfo(shape.dtype).eps
        hooks = self._results(models.by_hooks(self.model, self.shape, self.weights), batch)
        self._allowed = [max(edits.TIMES * error, rounding) for error in self._distances(hooks)]

    @staticmethod
    def _results(stepper: Stepper, batch: Batch | Packed) -> list[Tensor]:
        with stepper.around():
            loss = stepper.loss(batch)
            loss.backward()
        return [loss.detach(), *stepper.gradients()]

    def _distances(self, found: Sequence[Tensor]) -> list[float]:
        pairs = zip(found, self._exact, strict=True)
        return [
            float((own.double() - exact).abs().max() / exact.abs().max()) for own, exact in pairs
        ]

    def judge(self, found: Sequence[Tensor]) -> Verdict:
        """What is to be said of a loss and the gradients of each layer's W."""
        pairs = zip(self._distances(found), self._allowed, strict=True)
        return Verdict(*max(pairs, key=lambda pair: pair[0] / pair[1]))

    def __call__(self, build: Build, batch: Batch | Packed | None = None) -> Verdict:
        """Judge a model built on the gate's, on the gate's batch or on another form of the same
        examples.
        """
        stepper = build(self.model, self.shape, self.weights)
        return self.judge(self._results(stepper, self.batch if batch is None else batch))
