"""Suite 4: cost of a LoReFT training step over the frozen model's step, in time and memory.

The baseline is the frozen model's forward and its backward to the input embeddings, which any
method that edits inside the model needs. A training step adds the edits of every layer, the build
of R, their gradients and AdamW. Models are Llama-like with random weights. The loss and the
gradient of W in each layer are compared with plain PyTorch in fp64 on the model cut to two layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch

from benchmarks import models, shapes, third_party
from benchmarks.correctness import Build, StepGate
from benchmarks.models import Shape
from benchmarks.protocol import Case, CaseSpec, RunSettings
from benchmarks.shapes import LLAMA_1B, LLAMA_8B, small

TITLE = "Training step"
ABOUT = (
    "forward, backward and AdamW with LoReFT in every layer, over the frozen model's forward and "
    "backward"
)
FROZEN = "frozen model"


def model_shapes(settings: RunSettings) -> list[Shape]:
    """Return the models and their variants."""
    if settings.quick:
        return [shapes.QUICK]
    if settings.device == "cpu":
        wide = small(2048)
        variants = [small(512), small(1024), wide, small(4096, layers=2, batch=2)]
        variants += [
            dataclasses.replace(wide, spec="prompt"),
            dataclasses.replace(wide, checkpointing=True),
        ]
        variants += [small(512, layers=n) for n in (2, 8, 16)]
        return [*variants, dataclasses.replace(variants[0], compiled=True)]
    one, eight = LLAMA_1B, LLAMA_8B
    variants = [
        one,
        eight,
        dataclasses.replace(one, spec="prompt"),
        dataclasses.replace(eight, spec="prompt"),
    ]
    variants += [
        dataclasses.replace(one, checkpointing=True),
        dataclasses.replace(eight, checkpointing=True),
    ]
    return [*variants, dataclasses.replace(one, compiled=True)]


def specs(settings: RunSettings) -> Iterator[CaseSpec]:
    """Yield every model."""
    for shape in model_shapes(settings):
        build = functools.partial(_case, shape, settings.device)
        yield CaseSpec("step", shape.dimensions, shape.dtype, build)


def _case(shape: Shape, device: str) -> Case:
    torch.compiler.reset()
    model, weights = models.llama(shape, device), models.weights(shape, device)
    batches = [models.batch(shape, device, k) for k in range(4)]
    builds: dict[str, Build] = {
        "reft_kernels": models.peft_stepper,
        "eager hooks, cached R": functools.partial(models.hooks_stepper, cached=True),
        "eager hooks": models.hooks_stepper,
    }
    if not shape.checkpointing and not shape.compiled:  # neither package supports them
        for name, build in (
            ("pyreft", third_party.pyreft_stepper),
            ("adapters", third_party.adapters_stepper),
        ):
            builds |= {
                name: build,
                f"reft_kernels, in {name}": functools.partial(build, accelerated=True),
            }
    # adapters takes the last tokens of the sequence, not those of the prompt
    gate = functools.cache(
        lambda whole: StepGate(shape, device, models.batch(shape, device, whole=whole))
    )
    providers = {FROZEN: models.provider(lambda: models.frozen(model, shape), batches)}
    for name, build in builds.items():
        make = functools.partial(build, model, shape, weights)
        whole = name.endswith("adapters")
        providers[name] = models.provider(
            make, batches, lambda build=build, whole=whole: gate(whole)(build)
        )
    return Case(
        "training_step",
        "step",
        shape.dimensions,
        shape.dtype,
        providers,
        FROZEN,
        len(batches),
        rounds=7,
    )
