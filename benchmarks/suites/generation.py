"""Suite 5: cost of prefill and decoding over the frozen model.

A Llama-like model with random weights is edited at the first and last 7 tokens of the prompt in
every layer. A prefill is one forward over the prompt that fills the cache and returns the last
token's logits, as in ``generate``. A decode call feeds 16 further tokens one by one to a filled
cache and edits nothing. The logits of every prompt token and of the decoded tokens are compared
with fp64. All models share one set of weights.
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
from benchmarks.models import Shape
from benchmarks.protocol import AccuracyCheck, Call, Case, Provider, RunSettings
from reft_kernels import positions

TITLE = "Prefill and decoding"
ABOUT = (
    "time over the frozen model's: the prompt with f7+l7 of every layer edited, and 16 decoded "
    "tokens"
)
FROZEN, OURS, EAGER = "frozen model", "reft_kernels", "eager hooks"
AccuracyChecks = dict[str, dict[str, AccuracyCheck]]
STEPS, QUICK_STEPS, CHECKED_STEPS, CHECKED_TOKENS = 16, 4, 4, 8
QUICK = Shape("llama-64x2", 64, 2, 4, 2, 176, 256, 2, 16)


def model_shapes(settings: RunSettings) -> list[Shape]:
    """Return the models and their batches."""
    if settings.quick:
        return [QUICK]
    if settings.device == "cpu":
        return [shapes.small(1024, length=128)]
    return [shapes.LLAMA_1B, dataclasses.replace(shapes.LLAMA_8B, batch=8)]


def cases(settings: RunSettings) -> Iterator[Case]:
    """Yield both modes of each model.

    Raises:
        RuntimeError: If greedy generation by reft_kernels and by plain hooks differs in fp32.
    """
    _check_tokens(settings.device)
    for shape in model_shapes(settings):
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
    name: str, model: nn.Module, tokens: _Tokens, mode: str, checked: Callable[[], AccuracyChecks]
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
    """A batch of prompts without padding, and the tokens that are decoded after them."""

    def __init__(self, shape: Shape, steps: int, device: str) -> None:
        self.width, self.end = shape.length, shape.length + steps
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(
            0, shape.vocabulary, (shape.batch, self.end), generator=generator
        ).to(device)
        self.mask = torch.ones_like(self.ids)

    @torch.no_grad()
    def prefill(self, model: nn.Module, keep: int = 1) -> tuple[Cache, Tensor]:
        """Return the cache, and the logits of the last ``keep`` tokens (0: of all tokens)."""
        prompt = {
            "input_ids": self.ids[:, : self.width],
            "attention_mask": self.mask[:, : self.width],
        }
        out = model(**prompt, use_cache=True, logits_to_keep=keep)
        return out.past_key_values, out.logits

    @torch.no_grad()
    def decode(self, model: nn.Module, cache: Cache, most: int = STEPS) -> list[Tensor]:
        """Return the logits of each decoded token."""
        logits = []
        for column in range(self.width, min(self.end, self.width + most)):
            step = {
                "input_ids": self.ids[:, column : column + 1],
                "attention_mask": self.mask[:, : column + 1],
            }
            logits.append(model(**step, past_key_values=cache, use_cache=True).logits)
        return logits

    def logits(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the logits that are compared with fp64, by mode."""
        cache, prompt = self.prefill(model, keep=0)
        return {"prefill": prompt, "decode": torch.cat(self.decode(model, cache, CHECKED_STEPS), 1)}


def _subjects(shape: Shape, device: str) -> dict[str, nn.Module]:
    frozen, weights = models.llama(shape, device).eval(), models.weights(shape, device)
    edited, _ = models.peft_model(frozen, shape, weights)
    return {
        FROZEN: frozen,
        OURS: edited.eval(),
        EAGER: _hooked(models.shallow_copy(frozen), shape, weights, shape.dtype),
    }


def _hooked(
    model: nn.Module, shape: Shape, weights: models.Weights, dtype: torch.dtype
) -> nn.Module:
    """Edit the prompt by plain hooks that gather, edit with the unfolded formula and scatter."""
    rows = positions.resolve(shape.spec, [shape.length], shape.length, device=weights[0][0].device)
    columns = rows[rows >= 0].long()

    def hook(layer: nn.Module, args: object, hidden: Tensor, *, edit: list[Tensor]) -> Tensor:
        if hidden.shape[1] == 1:
            return hidden
        return hidden.index_copy_(1, columns, edits.eager_unfolded(hidden[:, columns], *edit))

    for layer, triple in zip(model.model.layers, weights, strict=True):
        layer.register_forward_hook(functools.partial(hook, edit=[t.to(dtype) for t in triple]))
    return model


def _doubled(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of the model that computes in fp64.

    To save memory, the parameters of each part are converted just before it runs and converted back
    after it.
    """
    twin = models.shallow_copy(model)
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


def _verdicts(subjects: dict[str, nn.Module], shape: Shape, tokens: _Tokens) -> AccuracyChecks:
    """Return the accuracy of each provider in each mode.

    The allowed error is twice that of the plain hooks, or 16 units of the dtype's precision.
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
            logits = tokens.logits(subjects[name])
            errors[name] = {
                mode: float((value.double() - exact[mode]).abs().max() / exact[mode].abs().max())
                for mode, value in logits.items()
            }
    least = edits.EPS * torch.finfo(shape.dtype).eps
    allowed = {mode: max(edits.TIMES * error, least) for mode, error in errors[EAGER].items()}
    return {
        name: {mode: AccuracyCheck(error, allowed[mode]) for mode, error in by_mode.items()}
        for name, by_mode in errors.items()
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
