"""Cost of a batch whose examples belong to several adapters.

A Llama-like model has k LoReFT adapters of ranks 4 and 8 at the first and last 7 tokens of the
prompt, in every layer. A call returns the last token's logits of one batch of prompts, whose
examples take the adapters in turn: in one forward with ``adapter_names``, whose layers edit all
examples in one launch; in one forward with a launch for each adapter and layer, as before the
adapters shared a launch; or in k forwards, each of the examples of one adapter. The logits are
compared with those of k forwards in fp64.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import edits, models, shapes
from benchmarks.models import Shape
from benchmarks.protocol import AccuracyCheck, Call, Case, Provider, RunSettings
from reft_kernels.model import member_groups

TITLE = "Several adapters in one batch"
ABOUT = "time of one forward of a batch with k adapters over that of k forwards"
TOGETHER, EACH_LAUNCH, APART = "reft_kernels", "one launch an adapter", "k forwards"
RANKS = 4, 8
Forward = Callable[[nn.Module], Tensor]


def model_shapes(settings: RunSettings) -> list[Shape]:
    """Return the models and their batches."""
    if settings.quick:
        return [dataclasses.replace(shapes.QUICK, batch=4, length=32)]
    if settings.device == "cpu":
        return [shapes.small(512, batch=16)]
    return [dataclasses.replace(shapes.LLAMA_1B, batch=32)]


def cases(settings: RunSettings) -> Iterator[Case]:
    """Yield a case for each model and number of adapters."""
    for shape in model_shapes(settings):
        for count in (1, 4) if settings.quick else (1, 4, 16):
            dimensions = {k: v for k, v in shape.dimensions.items() if k != "r"}
            dimensions |= {"adapters": count}
            providers = _providers(shape, count, settings.device)
            yield Case("many_adapters", "forward", dimensions, shape.dtype, providers, APART)


def _model(shape: Shape, count: int, frozen: nn.Module) -> nn.Module:
    """Return a model with adapters "0" to "count - 1"; equal for equal arguments."""
    from peft import get_peft_model

    from reft_kernels.integrations.peft import ReftConfig

    torch.manual_seed(2)
    model = models.shallow_copy(frozen)
    for number in range(count):
        config = ReftConfig(rank=RANKS[number % 2], positions=shape.spec, init="orthogonal")
        if number:
            model.add_adapter(str(number), config)
        else:
            model = get_peft_model(model, config, adapter_name="0")
    return model.eval()


def _providers(shape: Shape, count: int, device: str) -> dict[str, Provider]:
    frozen = models.llama(shape, device).eval()
    ids = torch.randint(
        3, shape.vocabulary, (shape.batch, shape.length), generator=torch.Generator().manual_seed(0)
    ).to(device)
    names = [str(example % count) for example in range(shape.batch)]

    @torch.no_grad()
    def together(model: nn.Module) -> Tensor:
        return model(input_ids=ids, adapter_names=names, logits_to_keep=1).logits[:, 0]

    @torch.no_grad()
    def apart(model: nn.Module) -> Tensor:
        logits = []
        for number in range(count):
            model.set_adapter(str(number))
            logits.append(model(input_ids=ids[number::count], logits_to_keep=1).logits[:, 0])
        return torch.stack(logits, dim=1).flatten(0, 1)

    # the groups that this call makes are kept
    each = _model(shape, count, frozen)
    with mock.patch.object(member_groups, "formula_of", lambda stack, weights: (stack,)):
        together(each)

    @functools.cache
    def exact() -> Tensor:
        return apart(_model(shape, count, copy.deepcopy(frozen).double()))

    def error(forward: Forward, model: nn.Module) -> float:
        want = exact()
        return float((forward(model).double() - want).abs().max() / want.abs().max())

    def check(forward: Forward, model: nn.Module) -> AccuracyCheck:
        least = edits.EPS * torch.finfo(shape.dtype).eps
        allowed = max(edits.TIMES * error(apart, subjects[APART][1]), least)
        return AccuracyCheck(error(forward, model), allowed)

    subjects: dict[str, tuple[Forward, nn.Module]] = {
        TOGETHER: (together, _model(shape, count, frozen)),
        EACH_LAUNCH: (together, each),
        APART: (apart, _model(shape, count, frozen)),
    }
    return {
        name: Provider(functools.partial(_prepared, *subject), functools.partial(check, *subject))
        for name, subject in subjects.items()
    }


def _prepared(forward: Forward, model: nn.Module, number: int) -> Call:
    return Call(lambda _: forward(model), capturable=False)
