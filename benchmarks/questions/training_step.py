"""Question 4: what does a LoReFT training step cost over the frozen model's own, in time and in memory?

The baseline is the frozen model's forward and its backward to the input embeddings, which any method that edits inside the
model has to pay; a step adds the edits of every layer, the build of R, their gradients and AdamW. Models are Llama-like with
random weights. A provider is held to plain PyTorch in fp64 on the same model cut to two layers: loss, and
gradient of W in each layer.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import edits, models, others
from benchmarks.harness import Call, Case, Provider, Settings, Verdict
from benchmarks.models import Shape, Stepper

TITLE = "Training step"
ABOUT = "forward, backward and AdamW with LoReFT in every layer, over the frozen model's forward and backward"
FROZEN = "frozen model"
Build = Callable[..., Stepper]


def _small(name: str, hidden: int, **options: object) -> Shape:
    return Shape(name, hidden, 4, hidden // 64, hidden // 64, hidden * 11 // 4, 8192, 4, 64, **options)


def shapes(settings: Settings) -> list[Shape]:
    """Models and what is switched on."""
    if settings.quick:
        return [dataclasses.replace(_small("llama-128x2", 128, dtype=torch.float32), layers=2, batch=2, length=32)]
    if settings.device == "cpu":
        wide = _small("llama-2048x4", 2048)
        variants = [_small("llama-512x4", 512), _small("llama-1024x4", 1024), wide]
        variants += [dataclasses.replace(_small("llama-4096x2", 4096), layers=2, batch=2)]
        variants += [dataclasses.replace(wide, spec="prompt"), dataclasses.replace(wide, checkpointing=True)]
        variants += [dataclasses.replace(_small(f"llama-512x{n}", 512), layers=n) for n in (2, 8, 16)]
        return [*variants, dataclasses.replace(variants[0], compiled=True)]
    one = Shape("llama-3.2-1b", 2048, 16, 32, 8, 8192, 128256, 8, 512, dtype=torch.bfloat16)
    eight = Shape("llama-3-8b", 4096, 32, 32, 8, 14336, 128256, 4, 512, dtype=torch.bfloat16)
    variants = [one, eight, dataclasses.replace(one, spec="prompt"), dataclasses.replace(eight, spec="prompt")]
    variants += [dataclasses.replace(one, checkpointing=True), dataclasses.replace(eight, checkpointing=True)]
    return [*variants, dataclasses.replace(one, compiled=True)]


def cases(settings: Settings) -> Iterator[Case]:
    """Every model."""
    for shape in shapes(settings):
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
        for name, build in (("pyreft", others.pyreft_stepper), ("adapters", others.adapters_stepper)):
            builds |= {name: build, f"reft_kernels, in {name}": functools.partial(build, accelerated=True)}
    gate = functools.cache(lambda whole: _Gate(shape, device, whole))
    providers = {FROZEN: _provider(lambda: models.frozen(model, shape), batches)}
    for name, build in builds.items():
        make = functools.partial(build, model, shape, weights)
        whole = name.endswith("adapters")
        providers[name] = _provider(make, batches, lambda build=build, whole=whole: gate(whole)(build))
    return Case("training_step", "step", shape.dimensions, shape.dtype, providers, FROZEN, len(batches), rounds=7)


def _provider(
    make: Callable[[], Stepper], batches: list[models.Batch], check: Callable[[], Verdict] | None = None
) -> Provider:  # fmt: skip
    built = functools.cache(make)  # one model a provider, whatever the number of batches

    def prepare(k: int) -> Call:
        stepper = built()
        return Call(lambda _: stepper.step(batches[k]), capturable=False, countable=False)

    return Provider(prepare, check)


class _Gate:
    """Loss and gradients of W against plain PyTorch in fp64, on the model cut to two layers, nothing switched on.

    ``whole``: the last tokens are those of the sequence, not of the prompt, as adapters reads positions.
    """

    def __init__(self, shape: Shape, device: str, whole: bool) -> None:
        self.shape = dataclasses.replace(shape.cut(2), checkpointing=False, compiled=False)
        self.model, self.weights = models.llama(self.shape, device), models.weights(self.shape, device)
        self.batch = models.batch(self.shape, device, whole=whole)
        exact = copy.deepcopy(self.model).double()
        self._exact = self._results(models.by_hooks(exact, self.shape, self.weights))
        rounding = edits.EPS * torch.finfo(shape.dtype).eps
        self._allowed = [max(edits.TIMES * error, rounding) for error in self._distances(models.by_hooks)]

    def _results(self, stepper: Stepper) -> list[Tensor]:
        with stepper.around():
            loss = stepper.loss(self.batch)
            loss.backward()
        return [loss.detach(), *stepper.gradients()]

    def _distances(self, build: Build) -> list[float]:
        found = self._results(build(self.model, self.shape, self.weights))
        pairs = zip(found, self._exact, strict=True)
        return [float((own.double() - exact).abs().max() / exact.abs().max()) for own, exact in pairs]

    def __call__(self, build: Build) -> Verdict:
        pairs = zip(self._distances(build), self._allowed, strict=True)
        return Verdict(*max(pairs, key=lambda pair: pair[0] / pair[1]))
