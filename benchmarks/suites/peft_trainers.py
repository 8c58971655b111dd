"""Suite 11: steps of whole trainers of ReFT and LoRA, on rows of real lengths.

A call is one optimizer step, from the end of one to the end of the next, with data loader,
collator, AdamW, schedule, clipping, and a log line every 10 steps:

    frozen model     Trainer; forward and backward, with one trained vector at the embeddings
    reft_kernels     reft-train's Trainer, which computes the logits of supervised tokens only
    pyreft           its ReftTrainerForCausalLM, which passes positions as nested lists
    socket-lm        Trainer with its ReFTAdapter
    LoRA             Trainer with PEFT's LoRA of the same rank on all linear layers

pyreft and socket-lm are measured with f7+l7 only. Models and rows are those of suite 10 with
SmolLM2-135M's shape, in fp32. All trainers see the same rows in the same order, two batches an
epoch, so that "prefix states" finds the states of all rows after the warm-up; "prefix states, first
epoch" keeps none and computes them in each step. The steps of ReFT are compared with plain PyTorch
in fp64 on the model cut to two layers: those of reft_kernels through its Trainer, those of the
others by their loss and gradients alone. Each trainer has a thread of its own, and they take turns;
see :mod:`benchmarks.trainer_thread`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from reft_train.data.collating import PaddingCollator
from reft_train.data.sampling import ShuffledSampler
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks import models, shapes, third_party
from benchmarks.correctness import StepGate
from benchmarks.models import Shape, Weights
from benchmarks.protocol import AccuracyCheck, Call, Case, Provider, RunSettings
from benchmarks.suites import peft_methods, trainer_step
from benchmarks.suites.peft_methods import BOOLQ, FROZEN, GSM8K, SMOLLM2, Lengths
from benchmarks.trainer_thread import TrainerThread
from reft_kernels import positions

TITLE = "Steps of trainers of PEFT methods"
ABOUT = "one optimizer step of several packages' trainers, over a plain Trainer's frozen model"
BATCHES = 2
Items = list[dict[str, list]]
MakeTrainer = Callable[[Sequence[TrainerCallback]], AbstractContextManager[Any]]


def inputs(settings: RunSettings) -> list[tuple[Shape, str, Lengths]]:
    """Return the models and their rows."""
    if settings.quick:
        return [
            (dataclasses.replace(shapes.QUICK, spec=spec), "boolq-like", Lengths((14, 20), (3, 6)))
            for spec in ("f7+l7", "l7")
        ]
    few = dataclasses.replace(SMOLLM2, batch=2)
    kinds = [(SMOLLM2, "boolq-like", BOOLQ), (few, "gsm8k-like", GSM8K)]
    return [
        (dataclasses.replace(shape, spec=spec), rows, lengths)
        for spec in ("f7+l7", "l7")
        for shape, rows, lengths in kinds
    ]


def cases(settings: RunSettings) -> Iterator[Case]:
    """Yield every model and kind of rows. The trainings end with their case."""
    for shape, rows, lengths in inputs(settings):
        with contextlib.ExitStack() as threads:
            yield _case(shape, rows, lengths, settings.device, threads)


def items(shape: Shape, lengths: Lengths) -> Items:
    """Return two batches of rows of random tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(bounds: tuple[int, int]) -> int:
        return int(torch.randint(bounds[0], bounds[1] + 1, (1,), generator=generator))

    rows: Items = []
    for _ in range(BATCHES * shape.batch):
        prompt, answer = draw(lengths.prompt), draw(lengths.answer)
        ids = torch.randint(0, shape.vocabulary, (prompt + answer,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


class _WithVector(nn.Module):
    """A frozen model with one trained vector, which is added to all embeddings."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.vector = nn.Parameter(torch.zeros(model.config.hidden_size, device=model.device))

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        embedded = self.model.get_input_embeddings()(input_ids) + self.vector
        return self.model(inputs_embeds=embedded, **inputs)


class _Ordered(Trainer):
    """Trainer with the order of rows of reft-train."""

    def _get_train_sampler(self, *args: Any) -> ShuffledSampler:
        assert self.train_dataset is not None
        return ShuffledSampler(len(self.train_dataset), trainer_step.SEED)  # type: ignore[arg-type]


def _arguments(shape: Shape, folder: str, device: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=shape.batch,
        learning_rate=models.LEARNING_RATE,
        max_steps=trainer_step.STEPS,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        seed=trainer_step.SEED,
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=device == "cpu",
    )


@contextlib.contextmanager
def _plain(
    make: Callable[[], nn.Module],
    shape: Shape,
    data: Items,
    device: str,
    callbacks: Sequence[TrainerCallback],
) -> Iterator[Trainer]:
    """Yield a Trainer of a model whose output has its loss."""
    with tempfile.TemporaryDirectory(prefix="peft-trainers-") as folder:
        yield _Ordered(
            model=make(),
            args=_arguments(shape, folder, device),
            train_dataset=data,  # type: ignore[arg-type]
            data_collator=PaddingCollator(0),
            callbacks=list(callbacks),
        )


@contextlib.contextmanager
def _pyreft(
    model: nn.Module,
    shape: Shape,
    weights: Weights,
    data: Items,
    device: str,
    callbacks: Sequence[TrainerCallback],
) -> Iterator[Trainer]:
    """Yield pyreft's trainer; positions are a column of the data, as in its own data sets."""
    tuned = third_party.pyreft_model(models.shallow_copy(model), weights)
    package = importlib.import_module("pyreft.reft_trainer")

    class _Trainer(package.ReftTrainerForCausalLM):  # type: ignore[name-defined, misc]
        def get_train_dataloader(self) -> Any:  # in the order of the other trainers
            order = ShuffledSampler(len(self.train_dataset), trainer_step.SEED)
            return package.make_dataloader(
                self.train_dataset, self._train_batch_size, self.data_collator, False, order
            )

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = 0
        ) -> Any:  # transformers passes one argument more than pyreft 0.1.0 takes
            return super().compute_loss(model, inputs, return_outputs)

    padded = PaddingCollator(0)

    def collate(rows: Sequence[dict[str, list]]) -> dict[str, Tensor]:
        prompts = [row["labels"].count(-100) for row in rows]
        batch = padded([{k: row[k] for k in ("input_ids", "labels")} for row in rows])
        width = batch["input_ids"].shape[1]
        columns = positions.resolve(shape.spec, prompts, width).view(len(rows), -1) % width
        places = columns.unsqueeze(1).expand(-1, len(weights), -1)
        return {**batch, "intervention_locations": places}

    with tempfile.TemporaryDirectory(prefix="peft-trainers-") as folder:
        yield _Trainer(
            model=tuned,
            args=_arguments(shape, folder, device),
            train_dataset=data,
            data_collator=collate,
            callbacks=list(callbacks),
        )


def _lora(model: nn.Module, shape: Shape) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    config = LoraConfig(r=shape.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(models.shallow_copy(model), config)  # type: ignore[arg-type]


def _provider(
    make: MakeTrainer,
    threads: contextlib.ExitStack,
    check: Callable[[], AccuracyCheck] | None = None,
) -> Provider:
    thread = TrainerThread(lambda callback: make([callback]), releases=True)
    threads.callback(thread.close)
    call = Call(lambda _: thread.step(), capturable=False, countable=False, other_thread=True)
    return Provider(lambda _: call, check)


def _case(
    shape: Shape, rows: str, lengths: Lengths, device: str, threads: contextlib.ExitStack
) -> Case:
    dimensions: dict[str, object] = {
        "model": shape.name,
        "rows": rows,
        "batch": shape.batch,
        "positions": shape.spec,
        "r": shape.rank,
    }
    data = items(shape, lengths)
    model = functools.cache(lambda: models.llama(shape, device))
    weights = functools.cache(lambda: models.weights(shape, device))
    first = trainer_step.first_batch(data, shape, device)
    gate = functools.cache(lambda: StepGate(shape, device, first))
    padded = functools.cache(lambda: StepGate(shape, device, peft_methods.over_padding(first)))

    def ours(**settings: Any) -> Provider:
        def make(callbacks: Sequence[TrainerCallback]) -> AbstractContextManager[Any]:
            return trainer_step.trainer(
                model(), shape, weights(), data, device, callbacks, **settings
            )

        check = functools.partial(trainer_step.gate, shape, device, data, **settings)
        return _provider(make, threads, check)

    def plain(make: Callable[[], nn.Module], check: Any = None) -> Provider:
        own = functools.partial(_plain, make, shape, data, device)
        return _provider(own, threads, check)

    providers = {
        FROZEN: plain(lambda: _WithVector(models.shallow_copy(model()))),
        "reft_kernels": ours(),
        "LoRA": plain(lambda: _lora(model(), shape)),
    }
    if positions.parse(shape.spec).first:
        providers["pyreft"] = _provider(
            lambda callbacks: _pyreft(model(), shape, weights(), data, device, callbacks),
            threads,
            lambda: gate()(third_party.pyreft_stepper),
        )
        providers["socket-lm"] = plain(
            lambda: third_party.socket_model(model(), shape, weights()),
            lambda: padded()(third_party.socket_stepper),
        )
    else:
        providers["reft_kernels, prefix states"] = ours(prefix_cache=1.0)
        providers["reft_kernels, prefix states, first epoch"] = ours(prefix_cache=1e-9)
    return Case(
        "peft_trainers", "step", dimensions, shape.dtype, providers, FROZEN, BATCHES, rounds=5
    )
