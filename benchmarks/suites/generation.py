"""Suite 5: what do prefill and decoding cost over the frozen model?

A Llama-like model with random weights, edited at the first and last 7 tokens of the prompt in every
layer. A prefill is one forward over the prompt that fills the cache and keeps the last token's
logits, as ``generate`` asks for; a decode call feeds 16
further tokens one by one to a filled cache, and edits nothing. Both are held to fp64: logits of
every prompt token, and of decoded tokens, the same for all. All models share one set of weights.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks import edits, models, shapes
from benchmarks.harness import Call, Case, Provider, Settings, Verdict
from benchmarks.models import Shape
from reft_kernels import positions

TITLE = "Prefill and decoding"
ABOUT = (
    "time over the frozen model's: the prompt with f7+l7 of every layer edited, and 16 decoded "
    "tokens"
)
FROZEN, OURS, EAGER = "frozen model", "reft_kernels", "eager hooks"
Verdicts = dict[str, dict[str, Verdict]]
STEPS, QUICK_STEPS, CHECKED_STEPS, CHECKED_TOKENS = 16, 4, 4, 8
QUICK = Shape("llama-64x2", 64, 2, 4, 2, 176, 256, 2, 16)


def asked(settings: Settings) -> list[Shape]:
    """Models and their batches."""
    if settings.quick:
        return [QUICK]
    if settings.device == "cpu":
        return [shapes.small(1024, length=128)]
    return [shapes.LLAMA_1B, dataclasses.replace(shapes.LLAMA_8B, batch=8)]


def cases(settings: Settings) -> Iterator[Case]:
    """Both modes of each model.

    Raises:
        RuntimeError: greedy generation by our tuner and by plain hooks differ in fp32.
    """
    _check_tokens(settings.device)
    for shape in asked(settings):
        steps = QUICK_STEPS if settings.quick else STEPS
        subjects, tokens = _subjects(shape, settings.device), _Tokens(shape, steps, settings.device)
        checked = functools.cache(functools.partial(_verdicts, subjects, shape, tokens))
        for mode in ("prefill", "decode"):
            dimensions = shape.dimensions | ({"steps": steps} if mode == "decode" else {})
            providers = {
                name: _provider(name, model, tokens, mode, checked)
                for name, model in subjects.items()
            }
            yield Case("generation", mode, dimensions, shape.dtype, providers, FROZEN, rounds=7)
        del subjects, providers, checked


def _provider(
    name: str, model: nn.Module, tokens: _Tokens, mode: str, checked: Callable[[], Verdicts]
) -> Provider:
    def prepare(_: int) -> Call:
        if mode == "prefill":
            return Call(lambda _: tokens.prefill(model), capturable=False)
        filled, _ = tokens.prefill(model)
        return Call(
            lambda cache: tokens.decode(model, cache),
            lambda: copy.deepcopy(filled),
            capturable=False,
        )

    return Provider(prepare, lambda: checked()[name][mode])


class _Tokens:
    """A batch of prompts without padding and the tokens that are decoded after them."""

    def __init__(self, shape: Shape, steps: int, device: str) -> None:
        self.width, self.end = shape.length, shape.length + steps
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(
            0, shape.vocabulary, (shape.batch, self.end), generator=generator
        ).to(device)
        self.mask = torch.ones_like(self.ids)

    @torch.no_grad()
    def prefill(self, model: nn.Module, keep: int = 1) -> tuple[Cache, Tensor]:
        """The cache, and logits of the last ``keep`` tokens (0: of all)."""
        prompt = {
            "input_ids": self.ids[:, : self.width],
            "attention_mask": self.mask[:, : self.width],
        }
        out = model(**prompt, use_cache=True, logits_to_keep=keep)
        return out.past_key_values, out.logits

    @torch.no_grad()
    def decode(self, model: nn.Module, cache: Cache, most: int = STEPS) -> list[Tensor]:
        """Logits of each decoded token."""
        found = []
        for column in range(self.width, min(self.end, self.width + most)):
            step = {
                "input_ids": self.ids[:, column : column + 1],
                "attention_mask": self.mask[:, : column + 1],
            }
            found.append(model(**step, past_key_values=cache, use_cache=True).logits)
        return found

    def logits(self, model: nn.Module) -> dict[str, Tensor]:
        """What is held to fp64, by mode."""
        cache, prompt = self.prefill(model, keep=0)
        return {"prefill": prompt, "decode": torch.cat(self.decode(model, cache, CHECKED_STEPS), 1)}


def _subjects(shape: Shape, device: str) -> dict[str, nn.Module]:
    frozen, weights = models.llama(shape, device).eval(), models.weights(shape, device)
    edited, _ = models.tuned(frozen, shape, weights)
    return {
        FROZEN: frozen,
        OURS: edited.eval(),
        EAGER: _hooked(models.sharing(frozen), shape, weights, shape.dtype),
    }


def _hooked(
    model: nn.Module, shape: Shape, weights: models.Weights, dtype: torch.dtype
) -> nn.Module:
    """Edit the prompt by plain hooks: gather, the unfolded formula, scatter; columns and cast
    weights are there before.
    """
    rows = positions.resolve(shape.spec, [shape.length], shape.length, device=weights[0][0].device)
    columns = rows[rows >= 0].long()

    def hook(layer: nn.Module, args: object, hidden: Tensor, *, own: list[Tensor]) -> Tensor:
        if hidden.shape[1] == 1:
            return hidden
        return hidden.index_copy_(1, columns, edits.eager_unfolded(hidden[:, columns], *own))

    for layer, triple in zip(model.model.layers, weights, strict=True):
        layer.register_forward_hook(functools.partial(hook, own=[t.to(dtype) for t in triple]))
    return model


def _doubled(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in fp64: each part's parameters become so just before it runs and go back after
    it, to save memory.
    """
    twin = models.sharing(model)
    for norm in (module for module in twin.modules() if isinstance(module, LlamaRMSNorm)):
        norm.forward = functools.partial(_exact_norm, norm)
    for part in (twin.model.embed_tokens, *twin.model.layers, twin.model.norm, twin.lm_head):
        part.register_forward_pre_hook(lambda part, args: _cast(part, torch.float64))
        part.register_forward_hook(lambda part, args, out: _cast(part, dtype))
    return twin


def _cast(part: nn.Module, dtype: torch.dtype) -> None:
    part.to(dtype)


def _exact_norm(norm: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    return nn.functional.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)


def _verdicts(subjects: dict[str, nn.Module], shape: Shape, tokens: _Tokens) -> Verdicts:
    """By provider and mode; twice the error of the plain hooks is allowed, or 16 units of the
    dtype's precision.
    """
    errors = {}
    for names in ((EAGER, OURS), (FROZEN,)):
        model = _doubled(subjects[FROZEN], shape.dtype)
        if FROZEN not in names:
            model = _hooked(
                model, shape, models.weights(shape, tokens.ids.device.type), torch.float64
            )
        exact = tokens.logits(model)
        for name in names:
            found = tokens.logits(subjects[name])
            errors[name] = {
                mode: float((own.double() - exact[mode]).abs().max() / exact[mode].abs().max())
                for mode, own in found.items()
            }
    least = edits.EPS * torch.finfo(shape.dtype).eps
    allowed = {mode: max(edits.TIMES * error, least) for mode, error in errors[EAGER].items()}
    return {
        name: {mode: Verdict(error, allowed[mode]) for mode, error in own.items()}
        for name, own in errors.items()
    }


def _check_tokens(device: str) -> None:
    subjects, prompt = _subjects(QUICK, device), _Tokens(QUICK, 0, device)
    options = {
        "max_new_tokens": CHECKED_TOKENS,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": prompt.mask,
    }
    ours, plain = (
        subjects[name].generate(prompt.ids, **options, use_cache=True) for name in (OURS, EAGER)
    )
    if not torch.equal(ours, plain):
        raise RuntimeError(
            f"greedy tokens: reft_kernels gave {ours.tolist()}, plain hooks {plain.tolist()}"
        )
