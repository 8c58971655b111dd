"""Suite 10: training steps of ReFT and LoRA by several packages, on rows of real lengths.

A call is forward, backward and AdamW of one padded batch; the baseline is the frozen model's full
forward and backward to the input embeddings. Models are random Llamas: SmolLM2-135M's shape, and
two layers of hidden size 4096 with a vocabulary of 8192. Tokens are random. Their numbers are drawn
uniformly between the 5th and 95th percentiles of real rows under SmolLM2's tokenizer: BoolQ as
LLM-Adapters asks it, 30 to 36 tokens of prompt and 6 of answer; gsm8k in the Alpaca template, 62 to
132 and 60 to 158.

"supervised logits" is ``keep_supervised_logits``, which serves LoRA as well. LoRA adapts all linear
layers with the same rank. The steps of ReFT are compared with plain PyTorch in fp64 on the model
cut to two layers; LoRA with supervised logits is compared with PEFT's LoRA in fp64.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks import edits, models, shapes, third_party
from benchmarks.correctness import StepGate
from benchmarks.models import PaddedBatch, Shape, Stepper, Weights
from benchmarks.protocol import AccuracyCheck, Case, CaseSpec, RunSettings

TITLE = "Training steps of PEFT methods"
ABOUT = "forward, backward and AdamW by several packages, over the frozen model's full step"
FROZEN = "frozen model"
SETS = 4
SMOLLM2 = Shape("smollm2-135m", 576, 30, 9, 3, 1536, 49152, 8, 256)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Fewest and most tokens of a row's prompt and of its answer."""

    prompt: tuple[int, int]
    answer: tuple[int, int]


BOOLQ, GSM8K = Lengths((30, 36), (6, 6)), Lengths((62, 132), (60, 158))


def inputs(settings: RunSettings) -> list[tuple[Shape, str, Lengths]]:
    """Return the models and their rows."""
    if settings.quick:
        return [(shapes.QUICK, "boolq-like", Lengths((14, 20), (3, 6)))]
    small = dataclasses.replace(SMOLLM2, batch=2)
    return [
        (SMOLLM2, "boolq-like", BOOLQ),
        (small, "gsm8k-like", GSM8K),
        (shapes.small(4096, layers=2, batch=2), "boolq-like", BOOLQ),
    ]


def specs(settings: RunSettings) -> Iterator[CaseSpec]:
    """Yield every model and kind of rows."""
    for shape, rows, lengths in inputs(settings):
        dimensions = {
            "model": shape.name,
            "rows": rows,
            "batch": shape.batch,
            "positions": shape.spec,
            "r": shape.rank,
        }
        build = functools.partial(_case, shape, lengths, dimensions, settings.device)
        yield CaseSpec("step", dimensions, shape.dtype, build)


def batch(shape: Shape, lengths: Lengths, device: str, number: int) -> PaddedBatch:
    """Return the ``number``-th batch of random tokens, padded on the right."""
    generator = torch.Generator().manual_seed(number)

    def draw(bounds: tuple[int, int]) -> Tensor:
        return torch.randint(
            bounds[0], bounds[1] + 1, (shape.batch, 1), generator=generator, dtype=torch.int64
        )

    prompt, answer = draw(lengths.prompt), draw(lengths.answer)
    width = int((prompt + answer).max())
    columns = torch.arange(width)
    mask = columns < prompt + answer
    ids = torch.randint(0, shape.vocabulary, mask.shape, generator=generator).where(mask, 0)
    labels = ids.where(mask & (columns >= prompt), -100)
    return models.collated(
        {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}, shape.spec, device
    )


def over_padding(found: PaddedBatch) -> PaddedBatch:
    """Return the batch with the first and last 7 columns of the padded rows as positions."""
    rows, width = found.input_ids.shape
    columns = torch.tensor([*range(7), *range(width - 7, width)])
    flat = (torch.arange(rows)[:, None] * width + columns).flatten()
    return dataclasses.replace(found, rows=flat.to(found.rows.device))


def lora_stepper(
    model: nn.Module, shape: Shape, weights: Weights, supervised: bool = False
) -> Stepper:
    """Return the step of PEFT's LoRA on all linear layers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    config = LoraConfig(r=shape.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(models.shallow_copy(model), config).train()
    if supervised:
        models.supervise(tuned)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    up = [p for name, p in tuned.named_parameters() if "lora_B" in name]  # zero at first
    return Stepper(lambda batch: tuned(**batch.inputs).loss, trained, lambda: [p.grad for p in up])


def _lora_gate(shape: Shape, device: str, found: PaddedBatch) -> AccuracyCheck:
    """Compare LoRA with supervised logits with all logits in fp64: twice the error of fp32."""
    cut = shape.cut(2)
    model = models.llama(cut, device)

    def results(base: nn.Module, supervised: bool) -> list[Tensor]:
        stepper = lora_stepper(base, cut, (), supervised)
        loss = stepper.loss(found)
        loss.backward()
        return [loss.detach(), *stepper.gradients()]

    exact = results(copy.deepcopy(model).double(), False)

    def errors(values: Sequence[Tensor]) -> list[float]:
        return [
            float((v.double() - e).abs().max() / e.abs().max())
            for v, e in zip(values, exact, strict=True)
        ]

    rounding = edits.EPS * torch.finfo(shape.dtype).eps
    pairs = [
        (error, max(edits.TIMES * plain, rounding))
        for error, plain in zip(
            errors(results(model, True)), errors(results(model, False)), strict=True
        )
    ]
    return AccuracyCheck(*max(pairs, key=lambda pair: pair[0] / pair[1]))


def _case(shape: Shape, lengths: Lengths, dimensions: dict[str, object], device: str) -> Case:
    half = dataclasses.replace(shape, dtype=torch.bfloat16)
    model, weights = models.llama(shape, device), models.weights(shape, device)
    half_model = functools.cache(lambda: models.llama(half, device))
    batches = [batch(shape, lengths, device, k) for k in range(SETS)]
    gate = functools.cache(lambda: StepGate(shape, device, batches[0]))
    padded = functools.cache(lambda: StepGate(shape, device, over_padding(batches[0])))
    half_gate = functools.cache(lambda: StepGate(half, device, batches[0]))
    supervised = functools.partial(models.peft_stepper, supervised=True)
    builds: dict[str, tuple[Callable[..., Stepper], Callable[[], StepGate]]] = {
        "reft_kernels": (models.peft_stepper, gate),
        "reft_kernels, supervised logits": (supervised, gate),
        "pyreft": (third_party.pyreft_stepper, gate),
        "socket-lm": (third_party.socket_stepper, padded),
    }
    providers = {FROZEN: models.provider(lambda: models.frozen(model, shape), batches)}
    for name, (build, judge) in builds.items():
        make = functools.partial(build, model, shape, weights)
        providers[name] = models.provider(
            make, batches, lambda build=build, judge=judge: judge()(build)
        )
    providers["reft_kernels, supervised logits, bf16 base"] = models.provider(
        lambda: supervised(half_model(), half, weights), batches, lambda: half_gate()(supervised)
    )
    providers["LoRA"] = models.provider(lambda: lora_stepper(model, shape, weights), batches)
    providers["LoRA, supervised logits"] = models.provider(
        lambda: lora_stepper(model, shape, weights, True),
        batches,
        lambda: _lora_gate(shape, device, batches[0]),
    )
    return Case("peft_methods", "step", dimensions, shape.dtype, providers, FROZEN, SETS, rounds=5)
