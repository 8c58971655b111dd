"""Accuracy check of training steps: loss and gradients of W against plain PyTorch in fp64."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import edits, models
from benchmarks.models import PackedBatch, PaddedBatch, Shape, Stepper
from benchmarks.protocol import AccuracyCheck

Build = Callable[..., Stepper]


class StepGate:
    """Compare a training step with plain PyTorch in fp64, on the model cut to two layers.

    The loss and the gradient of each layer's W are compared, with checkpointing and compilation
    disabled. The allowed error is 16 units of the dtype's precision, relative to the largest
    reference value, or twice the error of forward hooks in plain PyTorch in the same dtype,
    whichever is larger.

    Args:
        shape: The model and batch of the suite.
        device: Device to compute on.
        batch: Batch for the reference step and for the hooks.

    Attributes:
        shape, model, weights: The frozen model cut to two layers, and R, W and b of its layers.
    """

    def __init__(self, shape: Shape, device: str, batch: PaddedBatch) -> None:
        self.shape = dataclasses.replace(shape.cut(2), checkpointing=False, compiled=False)
        self.model, self.weights = (
            models.llama(self.shape, device),
            models.weights(self.shape, device),
        )
        self.batch = batch
        exact = copy.deepcopy(self.model).double()
        self._exact = self._results(models.hooks_stepper(exact, self.shape, self.weights), batch)
        rounding = edits.EPS * torch.finfo(shape.dtype).eps
        hooks = self._results(models.hooks_stepper(self.model, self.shape, self.weights), batch)
        self._allowed = [max(edits.TIMES * error, rounding) for error in self._distances(hooks)]

    @staticmethod
    def _results(stepper: Stepper, batch: PaddedBatch | PackedBatch) -> list[Tensor]:
        with stepper.around():
            loss = stepper.loss(batch)
            loss.backward()
        return [loss.detach(), *stepper.gradients()]

    def _distances(self, results: Sequence[Tensor]) -> list[float]:
        pairs = zip(results, self._exact, strict=True)
        return [
            float((value.double() - exact).abs().max() / exact.abs().max())
            for value, exact in pairs
        ]

    def judge(self, results: Sequence[Tensor]) -> AccuracyCheck:
        """Check a loss and the gradients of each layer's W."""
        pairs = zip(self._distances(results), self._allowed, strict=True)
        return AccuracyCheck(*max(pairs, key=lambda pair: pair[0] / pair[1]))

    def __call__(
        self, build: Build, batch: PaddedBatch | PackedBatch | None = None
    ) -> AccuracyCheck:
        """Check the step that ``build`` returns for the cut model.

        Args:
            build: Returns a :class:`benchmarks.models.Stepper` for a model, shape and weights.
            batch: The same examples in another form. Defaults to the batch of the constructor.
        """
        stepper = build(self.model, self.shape, self.weights)
        return self.judge(self._results(stepper, self.batch if batch is None else batch))
