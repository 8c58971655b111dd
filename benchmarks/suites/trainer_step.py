"""Suite 8: cost of a LoReFT step of the training program over the frozen model's step.

The program is reft-train's Trainer with data loader, collator, shuffling sampler, callbacks and
journal, AdamW with a schedule, gradient clipping, and a log line every 10 steps. Nothing is saved
or evaluated. A call is one optimizer step, from the end of one to the end of the next, so that it
includes all work between steps. A tenth of the calls writes a log line, which does not affect the
median. Examples are random tokens of one length, and their first half is the prompt.

The baseline is the frozen model's forward and backward to the input embeddings on the first
batches of the same order. Both run in one thread, see :mod:`benchmarks.trainer_thread`. The first
step's loss and gradient of W, before the optimizer, are compared with plain PyTorch in fp64 on the
model cut to two layers.
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
from reft_train.training.arguments import training_arguments
from reft_train.training.callbacks import LOG, Journal
from reft_train.training.trainer import ReftTrainer
from torch import Tensor, nn
from transformers import TrainerCallback

from benchmarks import models, shapes
from benchmarks.correctness import StepGate
from benchmarks.models import PaddedBatch, Shape, Weights
from benchmarks.protocol import AccuracyCheck, Call, Case, Provider, RunSettings
from benchmarks.trainer_thread import TrainerThread

TITLE = "Step of the training program"
ABOUT = (
    "one optimizer step through reft-train's Trainer, data to log, over the frozen model's "
    "forward and backward"
)
FROZEN, OURS = "frozen model", "reft_kernels, Trainer"
EXAMPLES, STEPS, SETS, SEED = 1024, 1_000_000, 4, 42
NO_CLIPPING = 1e30  # a norm this large leaves gradients unchanged
Items = Sequence[dict[str, list[int]]]


def model_shapes(settings: RunSettings) -> list[Shape]:
    """Return the models and their batches."""
    if settings.quick:
        return [shapes.QUICK]
    return (
        [shapes.small(512), shapes.small(2048)] if settings.device == "cpu" else [shapes.LLAMA_1B]
    )


def cases(settings: RunSettings) -> Iterator[Case]:
    """Yield every model. Its training ends with its case."""
    for shape in model_shapes(settings):
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

    def frozen_call(k: int) -> Call:
        stepper, batch = frozen(), first_batch(data, shape, device, k)
        return _call(lambda: trainer_thread.run_task(lambda: stepper.step(batch)))

    trained = Provider(
        lambda _: _call(trainer_thread.step),
        lambda: trainer_thread.run_task(lambda: gate(shape, device, data)),
    )
    providers = {FROZEN: Provider(frozen_call), OURS: trained}
    return trainer_thread, Case(
        "trainer_step", "step", shape.dimensions, shape.dtype, providers, FROZEN, SETS, rounds=7
    )


def _call(work: Callable[[], object]) -> Call:
    return Call(lambda _: work(), capturable=False, countable=False, other_thread=True)


def items(shape: Shape, count: int) -> Items:
    """Return examples of random tokens whose first half is the prompt."""
    ids = torch.randint(
        0, shape.vocabulary, (count, shape.length), generator=torch.Generator().manual_seed(0)
    ).tolist()
    half = shape.length // 2
    return [{"input_ids": row, "labels": [-100] * half + row[half:]} for row in ids]


def first_batch(data: Items, shape: Shape, device: str, number: int = 0) -> PaddedBatch:
    """Return the ``number``-th batch in training order."""
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
    """Yield the program's Trainer of a PEFT model with given R, W and b.

    Its log is written to a temporary folder.

    Args:
        model, shape, weights: The frozen model, its shape, and R, W and b of each layer.
        data: Training examples.
        device: Device to train on.
        callbacks: Callbacks to run after those of the program.
        settings: Run settings that differ from the suite's.
    """
    tuned, _ = models.peft_model(model, shape, weights)
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
        config = RunConfig(**fixed | settings)
        arguments = training_arguments(config, Path(folder), tuned, len(data), None)
        arguments.report_to = []  # TensorBoard may not be installed
        reft_trainer = ReftTrainer(
            collate=PaddingCollator(0),
            sampler=ShuffledSampler(len(data), SEED),
            model=tuned,
            args=arguments,
            train_dataset=data,
            prefix_bytes=round(config.prefix_cache * 1e9),
            callbacks=[Journal(Path(folder) / LOG), *callbacks],
        )
        try:
            yield reft_trainer
        finally:
            reft_trainer.close()


class _FirstStep(TrainerCallback):
    """Record the loss and the gradients of W of one step, then stop training."""

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


def gate(
    shape: Shape, device: str, data: Items, clip: float = NO_CLIPPING, **settings: object
) -> AccuracyCheck:
    """Compare loss and gradients of W of the program's first step with fp64.

    Args:
        shape, device, data: Model, device and training examples.
        clip: Norm at which gradients are clipped. By default they are not.
        settings: See :func:`trainer`.
    """
    exact, recorder = StepGate(shape, device, first_batch(data, shape, device)), _FirstStep()
    with trainer(
        exact.model,
        exact.shape,
        exact.weights,
        data,
        device,
        [recorder],
        max_grad_norm=clip,
        **settings,
    ) as reft_trainer:
        reft_trainer.train()
    return exact.judge([recorder.loss.to(device), *recorder.gradients])
