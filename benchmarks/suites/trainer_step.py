"""Suite 8: what does a LoReFT step through the whole training program cost over the frozen model's
forward and backward?

The program is reft-train's: its Trainer with data loader, collator, shuffling sampler, callbacks
and journal, AdamW under a schedule, clipped gradients, a line of the log every 10 steps; nothing is
saved or evaluated. A call is one optimizer step, from the end of one to the end of the next, so
that all that the program does between steps is in it; the line of the log, which a tenth of the
calls writes, is not in their median. Examples are random tokens, all of one length, their first
half prompt. The baseline is the frozen model's forward and backward to the input embeddings on the
first batches of the same order; both are computed in one thread, see
:mod:`benchmarks.trainer_thread`. The first step's loss and gradient of W, before the optimizer, are
held to plain PyTorch in fp64 on the model cut to two layers.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from reft_train.config import RunConfig
from reft_train.data.collating import PaddingCollator
from reft_train.data.sampling import ShuffledSampler
from reft_train.reporting.log import LOG
from reft_train.training.arguments import training_arguments
from reft_train.training.callbacks import FiniteLoss, Journal
from reft_train.training.trainer import ReftTrainer
from torch import Tensor, nn
from transformers import TrainerCallback

from benchmarks import models, shapes
from benchmarks.correctness import StepGate
from benchmarks.harness import Call, Case, Provider, Settings, Verdict
from benchmarks.models import Batch, Shape, Weights
from benchmarks.trainer_thread import TrainerThread

TITLE = "Step of the training program"
ABOUT = (
    "one optimizer step through reft-train's Trainer, data to log, over the frozen model's "
    "forward and backward"
)
FROZEN, OURS = "frozen model", "reft_kernels, Trainer"
EXAMPLES, STEPS, SETS, SEED = 1024, 1_000_000, 4, 42
NO_CLIPPING = 1e30  # in the gate: clipping multiplies by 1
Items = Sequence[dict[str, list[int]]]


def asked(settings: Settings) -> list[Shape]:
    """Models and their batches."""
    if settings.quick:
        return [shapes.QUICK]
    return (
        [shapes.small(512), shapes.small(2048)] if settings.device == "cpu" else [shapes.LLAMA_1B]
    )


def cases(settings: Settings) -> Iterator[Case]:
    """Every model; its training ends with its case."""
    for shape in asked(settings):
        data = items(shape, shape.batch * 8 if settings.quick else EXAMPLES)
        trainer_thread, case = _case(shape, settings.device, data)
        try:
            yield case
        finally:
            trainer_thread.close()


def _case(shape: Shape, device: str, data: Items) -> tuple[TrainerThread, Case]:
    model, weights = models.llama(shape, device), models.weights(shape, device)
    trainer_thread = TrainerThread(
        lambda callback: trainer(model, shape, weights, data, device, [callback])
    )
    frozen = functools.cache(lambda: models.frozen(model, shape))

    def still(k: int) -> Call:
        stepper, batch = frozen(), first_batch(data, shape, device, k)
        return _call(lambda: trainer_thread.do(lambda: stepper.step(batch)))

    checked = Provider(
        lambda _: _call(trainer_thread.step),
        lambda: trainer_thread.do(lambda: gate(shape, device, data)),
    )
    providers = {FROZEN: Provider(still), OURS: checked}
    return trainer_thread, Case(
        "trainer_step", "step", shape.dimensions, shape.dtype, providers, FROZEN, SETS, rounds=7
    )


def _call(work: Callable[[], object]) -> Call:
    return Call(lambda _: work(), capturable=False, countable=False, elsewhere=True)


def items(shape: Shape, count: int) -> Items:
    """Examples of random tokens, the first half prompt."""
    ids = torch.randint(
        0, shape.vocabulary, (count, shape.length), generator=torch.Generator().manual_seed(0)
    ).tolist()
    half = shape.length // 2
    return [{"input_ids": row, "labels": [-100] * half + row[half:]} for row in ids]


def first_batch(data: Items, shape: Shape, device: str, number: int = 0) -> Batch:
    """The ``number``-th batch of the training's order."""
    order = list(ShuffledSampler(len(data), SEED))[
        number * shape.batch : (number + 1) * shape.batch
    ]
    return models.collated(PaddingCollator(0)([data[i] for i in order]), shape.spec, device)


@contextlib.contextmanager
def trainer(
    model: nn.Module,
    shape: Shape,
    weights: Weights,
    data: Items,
    device: str,
    callbacks: Sequence[TrainerCallback],
    **settings: object,
) -> Iterator[ReftTrainer]:
    """The program's Trainer of a PEFT model with given R, W, b; its log goes to a folder that is
    removed afterwards.

    Args:
        callbacks: after the program's own. settings: of the run, where they are to differ.
    """
    tuned, _ = models.tuned(model, shape, weights)
    with tempfile.TemporaryDirectory(prefix="trainer-step-") as folder:
        fixed: dict[str, Any] = {
            "model": shape.name,
            "task": "jsonl",
            "output": folder,
            "device": device,
            "rank": shape.rank,
            "positions": shape.spec,
            "batch_size": shape.batch,
            "accumulation": 1,
            "lr": models.LEARNING_RATE,
            "max_steps": STEPS,
            "save_every": STEPS,
            "seed": SEED,
            "log_every": 10,
        }
        arguments = training_arguments(
            RunConfig(**fixed | settings), Path(folder), tuned, len(data), None
        )
        arguments.report_to = []  # TensorBoard is not everywhere
        made = ReftTrainer(
            collate=PaddingCollator(0),
            sampler=ShuffledSampler(len(data), SEED),
            model=tuned,
            args=arguments,
            train_dataset=data,
            callbacks=[FiniteLoss(), Journal(Path(folder) / LOG), *callbacks],
        )
        try:
            yield made
        finally:
            made.close()


class _FirstStep(TrainerCallback):
    """Keeps the loss and the gradients of W of a single step, and ends the training."""

    def __init__(self) -> None:
        self.loss = torch.tensor(float("nan"))
        self.gradients: list[Tensor] = []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        (stack,) = (
            module for module in model.modules() if isinstance(module, models.StackedLoReFT)
        )
        self.gradients = [grad.clone() for grad in stack.W.grad]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = True
        return control

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        if "loss" in logs:
            self.loss = torch.tensor(logs["loss"])


def gate(shape: Shape, device: str, data: Items, clip: float = NO_CLIPPING) -> Verdict:
    """Loss and gradients of W of the program's first step against fp64, where gradients are not
    clipped.
    """
    exact, seen = StepGate(shape, device, first_batch(data, shape, device)), _FirstStep()
    with trainer(
        exact.model, exact.shape, exact.weights, data, device, [seen], max_grad_norm=clip
    ) as one:
        one.train()
    return exact.judge([seen.loss.to(device), *seen.gradients])
