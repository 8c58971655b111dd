"""Suite 9: throughput of packed training batches against padded ones.

A call is one LoReFT training step (forward, backward, AdamW) on 32 examples, so 1 / ratio is the
gain in examples per second. Tokens are random, answers have 6 tokens, and lengths are drawn from
one of two distributions:

- ``boolq``: prompts like BoolQ's questions with their passages, 8.9 and 108 tokens on average
  (Clark et al. 2019). Lognormal with that mean and sigma 0.5, examples cut at 512.
- ``questions``: whole examples like LLM-Adapters' rows of BoolQ, a question without its passage
  in a fixed sentence: 38 tokens, standard deviation 2.

"padding" has 32 random examples padded to the longest. "packing" has the same examples in rows of
up to 512 tokens. "padding, grouped by length" has other examples of the same distribution:
reft-train's sampler sorts 512 examples into groups of 32 by length, and the group whose padded
size is nearest to the mean is measured. The shape has the mean tokens per example, with padding
included, and as ``real`` without it. Loss and gradients of W of padded batches are compared with
plain PyTorch in fp64, those of a packed batch with the padded batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from reft_train.data.collating import PackingCollator, PaddingCollator
from reft_train.data.sampling import GroupedSampler
from torch import Tensor

from benchmarks import models, shapes
from benchmarks.correctness import StepGate
from benchmarks.models import PackedBatch, PaddedBatch, Shape
from benchmarks.protocol import Case, RunSettings

TITLE = "Packing"
ABOUT = (
    "a LoReFT step on 32 packed examples over a step on the same examples padded; 1 / ratio is the "
    "gain in examples per second"
)
PADDING, GROUPED, PACKING = "padding", "padding, grouped by length", "packing"
POOL, ROW, ANSWER, SETS = 512, 512, 6, 8
QUESTION, PASSAGE, SIGMA = 8.9, 108.0, 0.5
SENTENCE, SPREAD = 38.0, 2.0
Items = Sequence[dict[str, list[int]]]


def _with_passages(count: int, generator: torch.Generator) -> Tensor:
    location = math.log(QUESTION + PASSAGE) - SIGMA**2 / 2  # gives the lognormal that mean
    return torch.exp(location + SIGMA * torch.randn(count, generator=generator)) + ANSWER


def _questions(count: int, generator: torch.Generator) -> Tensor:
    return SENTENCE + SPREAD * torch.randn(count, generator=generator)


LENGTHS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "boolq": _with_passages,
    "questions": _questions,
}


def cases(settings: RunSettings) -> Iterator[Case]:
    """Yield both distributions of lengths."""
    sets, batch = (1, 4) if settings.quick else (SETS, 32)
    shape = dataclasses.replace(shapes.QUICK if settings.quick else shapes.small(512), batch=batch)
    for name in LENGTHS:
        yield _case(shape, name, settings.device, sets)


def pool(name: str, number: int, vocabulary: int) -> Items:
    """Return the ``number``-th 512 examples of a distribution."""
    generator = torch.Generator().manual_seed(number)
    lengths = LENGTHS[name](POOL, generator).round().int().clamp(2 * ANSWER, ROW).tolist()
    ids = [
        torch.randint(1, vocabulary, (length,), generator=generator).tolist() for length in lengths
    ]
    return [
        {"input_ids": row, "labels": [-100] * (len(row) - ANSWER) + row[-ANSWER:]} for row in ids
    ]


def typical_group(examples: Items, batch: int) -> Items:
    """Return the group by length whose longest example is nearest to the mean over the groups."""
    lengths = [len(item["input_ids"]) for item in examples]
    order = list(GroupedSampler(lengths, batch, seed=0))
    groups = [order[i : i + batch] for i in range(0, len(order), batch)]
    longest = [max(lengths[i] for i in group) for group in groups]
    mean = statistics.fmean(longest)
    nearest = min(range(len(groups)), key=lambda number: abs(longest[number] - mean))
    return [examples[i] for i in groups[nearest]]


def padded(examples: Items, shape: Shape, device: str) -> PaddedBatch:
    """Return the examples on one row each, padded to the longest."""
    return models.collated(PaddingCollator(0)(examples), shape.spec, device)


def packed(examples: Items, device: str) -> PackedBatch:
    """Return the examples in rows of up to 512 tokens."""
    batch = PackingCollator(ROW, 0)(examples)
    return PackedBatch(
        {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
    )


def _case(shape: Shape, name: str, device: str, sets: int) -> Case:
    model, weights = models.llama(shape, device), models.weights(shape, device)
    pools = [pool(name, number, shape.vocabulary) for number in range(sets)]
    # the examples are independent, so the first ones are a random batch
    random_batches = [examples[: shape.batch] for examples in pools]
    plain = [padded(examples, shape, device) for examples in random_batches]
    grouped = [padded(typical_group(examples, shape.batch), shape, device) for examples in pools]
    rows = [packed(examples, device) for examples in random_batches]
    gates = {
        id(batch): functools.cache(functools.partial(StepGate, shape, device, batch))
        for batch in (plain[0], grouped[0])
    }

    def provider(
        batches: Sequence[PaddedBatch | PackedBatch], exact: PaddedBatch
    ) -> models.Provider:
        build = functools.partial(models.peft_stepper, model, shape, weights)
        return models.provider(
            build, batches, lambda: gates[id(exact)]()(models.peft_stepper, batches[0])
        )

    providers = {
        PADDING: provider(plain, plain[0]),
        GROUPED: provider(grouped, grouped[0]),
        PACKING: provider(rows, plain[0]),
    }
    real = statistics.fmean(
        len(item["input_ids"]) for examples in random_batches for item in examples
    )
    sizes = {"padded": plain, "grouped": grouped, "packed": rows}
    tokens = {
        key: statistics.fmean(b.inputs["input_ids"].numel() for b in batches) / shape.batch
        for key, batches in sizes.items()
    }
    dimensions = {
        "model": shape.name,
        "batch": shape.batch,
        "lengths": name,
        "positions": shape.spec,
        "r": shape.rank,
    }
    dimensions |= {"real": round(real)} | {key: round(value) for key, value in tokens.items()}
    return Case("packing", "step", dimensions, shape.dtype, providers, PADDING, sets, rounds=SETS)
