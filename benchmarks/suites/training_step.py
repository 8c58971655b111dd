"""Suite 4: what does a LoReFT training step cost over the frozen model's own, in time and in
memory?

The baseline is the frozen model's forward and its backward to the input embeddings, which any
method that edits inside the model has to pay; a step adds the edits of every layer, the build of R,
their gradients and AdamW. Models are Llama-like with
random weights. A provider is held to plain PyTorch in fp64 on the same model cut to two layers:
loss, and gradient of W in each layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch

from benchmarks import models, shapes, third_party
from benchmarks.correctness import Build, StepGate
from benchmarks.harness import Case, Settings
from benchmarks.models import Shape
from benchmarks.shapes import LLAMA_1B, LLAMA_8B, small

TITLE = "Training step"
ABOUT = (
    "forward, backward and AdamW with LoReFT in every layer, over the frozen model's forward and "
    "backward"
)
FROZEN = "frozen model"


def asked(settings: Settings) -> list[Shape]:
    """Models and what is switched on."""
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


def cases(settings: Settings) -> Iterator[Case]:
    """Every model."""
    for shape in asked(settings):
        torch.compiler.reset()
        yield _case(shape, settings.device)


def _case(shape: Shape, device: str) -> Case:
    model, weights = models.llama(shape, device), models.weights(shape, device)
    batches = [models.batch(shape, device, k) for k in range(4)]
    builds: dict[str, Build] = {
        "reft_kernels": models.by_peft,
        "eager hooks, cached R": functools.partial(models.by_hooks, cached=True),
        "eager hooks": models.by_hooks,
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
    # adapters reads last tokens as those of the sequence, not of the prompt
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
