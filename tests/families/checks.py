"""The checks that every family must pass, each against the oracle of plain hooks."""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from reft_kernels.integrations.peft import ReftConfig
from reft_kernels.model import resolve
from tests.families.family import (
    BATCH,
    FAMILIES,
    Batch,
    Family,
    MissingClass,
    Place,
    Role,
    decoder_tokens,
    generator,
    mark_prompt,
    places,
    without,
)
from tests.families.oracle import POSITIONS, Weights, on_hidden, orthonormal, plain_edits

ROWS, GRADIENTS, IDENTITY = 1e-4, 2e-3, 1e-5
NEW = 4
RANDOM = ("dropout", "drop_path", "layerdrop", "jitter", "mask_time_prob", "mask_feature_prob")


class BaseFails(Exception):
    """The base model alone, without an adapter, raises in this version of transformers."""


# ---- models


def _quiet(holder: Any, depth: int = 0) -> None:
    """No dropout, layer drop, jitter or masking, in a module or a configuration."""
    for name, value in list(vars(holder).items()):
        if isinstance(value, float) and any(word in name for word in RANDOM):
            with contextlib.suppress(Exception):
                setattr(holder, name, 0.0)
        elif isinstance(value, transformers.PretrainedConfig) and depth < 3:
            _quiet(value, depth + 1)


@functools.lru_cache(maxsize=1)
def _base(name: str) -> nn.Module:
    family = FAMILIES[name]
    torch.manual_seed(0)
    try:
        model = family.make()
    except MissingClass:
        raise
    except Exception as error:
        raise BaseFails(f"{type(error).__name__}: {error}") from error
    for module in model.modules():
        _quiet(module)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    with torch.no_grad():  # biases and norms that start at 0 or 1 would hide mistakes
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))
            elif parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.15)
        for module in model.modules():  # nor a root of a zero at padding, whose slope is infinite
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].normal_(std=0.05)
    model = model.float().eval().requires_grad_(False)
    try:
        with torch.no_grad():
            model(**batches(family)[0])
    except Exception as error:
        raise BaseFails(f"{type(error).__name__}: {str(error)[:200]}") from error
    return model


def base_of(family: Family) -> nn.Module:
    """A fresh copy of the family's base model, in evaluation.

    Raises:
        MissingClass: transformers does not have it.
        BaseFails: it cannot be made, or does not run.
    """
    return copy.deepcopy(_base(family.name))


def attach(model: nn.Module, component: str, layers: Any = "all", **more: Any) -> PeftModel:
    """An adapter of rank 4 at a component of all layers.

    Raises:
        BaseFails: PEFT cannot attach an adapter of its own to this model either.
    """
    config = ReftConfig(layers=layers, rank=4, positions=POSITIONS, component=component, **more)
    try:
        return get_peft_model(model, config)
    except AttributeError as error:
        if lora_fails(model, str(error)):
            raise BaseFails(f"PEFT cannot attach LoRA either: {error}") from error
        raise


def lora_fails(model: nn.Module, message: str) -> bool:
    """Whether LoRA on the model's linear layers raises the same error."""
    try:
        get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear", r=2))
    except AttributeError as error:
        return str(error) == message
    return False


def stacks(model: nn.Module) -> list[nn.Module]:
    """The modules that hold the adapter's parameters, one for each width."""
    return [m for m in model.modules() if type(m).__name__.startswith("Stacked")]


def shake(model: nn.Module, seed: int = 7, scale: float = 0.5) -> nn.Module:
    """Move every adapter parameter off its initial value."""
    noise = generator(seed)
    with torch.no_grad():
        for stack in stacks(model):
            for p in stack.parameters():
                fan = p.shape[-1] ** 0.5 if p.dim() > 2 else 1.0
                p.add_(scale * torch.randn(p.shape, generator=noise) / fan)
    return model


def widths_of(model: nn.Module, at: list[Place], batch: Batch) -> list[int]:
    """The width of each place's hidden state, seen in a call of the base model."""
    widths = [0] * len(at)

    def note(index: int, hidden: Tensor) -> Tensor:
        widths[index] = hidden.shape[-1]
        return hidden

    with torch.no_grad(), on_hidden(model, at, note):
        model(**batch)
    return widths


def layers_in(model: nn.Module, widths: list[int]) -> list[tuple[nn.Module, int]]:
    """(stack, index in it) of each place: places of one width follow each other in one stack."""
    found, count = [], dict.fromkeys(widths, 0)
    by_width = {stack.W.shape[-1]: stack for stack in stacks(model)}
    for width in widths:
        found.append((by_width[width], count[width]))
        count[width] += 1
    assert count == {width: stack.W.shape[0] for width, stack in by_width.items()}, count
    return found


def weights_of(layers: list[tuple[nn.Module, int]], *, learn: bool = False) -> list[Weights]:
    """R, W and b of each place, copied out of the adapter."""
    out = []
    for stack, k in layers:
        R = orthonormal(stack.X[k].detach().double(), stack.signs[k].double()).float()
        W, b = stack.W[k].detach().clone(), stack.b[k].detach().clone()
        out.append(Weights(*(t.requires_grad_(learn) for t in (R, W, b))))
    return out


# ---- batches and outputs


def batches(family: Family) -> list[Batch]:
    """Padded on the right, on the left, unpadded, and unpadded alone."""
    asked = (("right", BATCH), ("left", BATCH), ("none", BATCH), ("none", 1))
    return [b for b in (family.inputs(*one) for one in asked) if b is not None]


def leading(output: Any) -> Tensor:
    """The logits of an output, or what stands in for them."""
    for name in ("logits", "logits_per_text", "last_hidden_state", "prediction_logits"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    return next(v for v in output.values() if isinstance(v, Tensor) and v.is_floating_point())


def meaningful(family: Family, batch: Batch, logits: Tensor) -> Tensor:
    """Logits without those at padding."""
    mask = batch.get("attention_mask")
    if family.scores_tokens and mask is not None and logits.shape[:2] == mask.shape:
        return logits[mask.bool()]
    return logits


def distance(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest entry; infinite where shapes differ."""
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape:
        return float("inf")
    finite = torch.isfinite(want)
    if not torch.equal(torch.isfinite(got), finite):
        return float("inf")
    got, want = got[finite], want[finite]
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-9))


def close(got: Tensor, want: Tensor, limit: float, what: str) -> None:
    found = distance(got, want)
    assert found <= limit, f"{what}: {found:.1e} apart, allowed {limit:.0e}"


def edited_tokens(family: Family, batch: Batch) -> Tensor | None:
    return None if family.tokens is None else family.tokens(batch)


@contextlib.contextmanager
def calm():
    """Warnings about prompts whose ends are not known are expected here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def call(model: nn.Module, batch: Batch) -> Any:
    torch.manual_seed(4)  # models that draw in their forward draw the same
    return model(**batch)


# ---- checks


def check_places(family: Family, seed: int = 7) -> None:
    """The component means the modules that the catalogue names."""
    model = base_of(family)
    want = places(model, family.role(), family.count)
    got = [(target.path, target.side) for target in resolve(model, family.component).targets]
    assert got == want, f"places {got}, expected {want}"


def check_identity(family: Family, seed: int = 7) -> None:
    """A fresh adapter changes nothing."""
    base = base_of(family)
    model = attach(base_of(family), family.component).eval()
    with torch.no_grad(), calm():
        for batch in batches(family):
            got, want = (meaningful(family, batch, leading(call(m, batch))) for m in (model, base))
            close(got, want, IDENTITY, "a fresh adapter")


def labelled(family: Family) -> list[tuple[str, Batch, Batch, Tensor]]:
    """(name, what the adapter's call has, what the base's has, the prompts' tokens)."""
    found = []
    for padding in ("right", "left"):
        batch = family.inputs(padding, BATCH) if family.labels else None
        if batch is None:
            continue
        labels, prompt, lengths = mark_prompt(family, batch)
        if family.tokens is not None and family.tokens(batch).shape != prompt.shape:
            continue
        found.append((f"labels, {padding}", {**batch, "labels": labels}, batch, prompt))
        if family.labels == "prompt":
            given = {**batch, "prompt_lengths": lengths}
            found.append((f"prompt_lengths, {padding}", given, batch, prompt))
    return found


def check_rows(family: Family, seed: int = 7, role: Role | None = None) -> None:
    """Logits as under plain hooks, whatever the padding and wherever the prompt ends."""
    base = base_of(family)
    role = role or family.role()
    layers = "all" if role.layers is None else list(role.layers)
    model = shake(attach(base_of(family), role.component, layers).eval(), seed)
    at = places(base, role, family.count)
    weights = weights_of(layers_in(model, widths_of(base, at, batches(family)[0])))
    cases = [
        (f"batch {n}", batch, batch, edited_tokens(family, batch) if role.tokens else None)
        for n, batch in enumerate(batches(family))
    ]
    power = 0.0
    for name, given, bare, tokens in cases + (labelled(family) if role.tokens else []):
        with torch.no_grad(), calm():
            with plain_edits(base, at, weights, tokens, family.layout, pads=family.pads) as ran:
                want = meaningful(family, bare, leading(call(base, bare)))
            assert ran, "no place ran"
            got = meaningful(family, bare, leading(call(model, given)))
            power = max(power, distance(meaningful(family, bare, leading(call(base, bare))), want))
        close(got, want, ROWS, name)
    assert power > 1e-4, f"the edit hardly shows: {power:.0e}"


def loss_of(family: Family, batch: Batch, output: Any) -> Tensor:
    """The output's loss, or a fixed combination of the logits where it has none."""
    if getattr(output, "loss", None) is not None and "labels" in batch:
        return output.loss
    logits = meaningful(family, batch, leading(output)).float()
    return (logits * torch.randn(logits.shape, generator=generator(3))).sum() / logits.shape[0]


def check_gradients(family: Family, seed: int = 7, role: Role | None = None) -> None:
    """Gradients of every adapter parameter as autograd has them through the plain hooks."""
    base = base_of(family).train()
    role = role or family.role()
    chosen = "all" if role.layers is None else list(role.layers)
    model = shake(attach(base_of(family), role.component, chosen).train(), seed)
    at = places(base, role, family.count)
    layers = layers_in(model, widths_of(base, at, batches(family)[0]))
    cases = [(n, g, p if role.tokens else None) for n, g, _, p in labelled(family) if "labels" in g]
    if not cases:
        cases = [
            (p, batch, edited_tokens(family, batch) if role.tokens else None)
            for p in ("right", "left")
            if (batch := family.inputs(p, BATCH)) is not None
        ]
    for name, batch, tokens in cases:
        weights = weights_of(layers, learn=True)
        with plain_edits(base, at, weights, tokens, family.layout, pads=family.pads) as ran:
            loss_of(family, batch, call(base, batch)).backward()
        model.zero_grad(set_to_none=True)
        with calm():
            loss_of(family, batch, call(model, batch)).backward()
        compare_gradients(name, layers, weights, ran)


def compare_gradients(
    name: str, layers: list[tuple[nn.Module, int]], weights: list[Weights], ran: set[int]
) -> None:
    """X's gradient is R's, through the reflections."""
    reached = 0
    for index in sorted(ran):
        (stack, k), (R, W, b) = layers[index], weights[index]
        if W.grad is None or not W.grad.any():  # a place whose edit the loss does not see
            assert stack.W.grad is None or not stack.W.grad[k].any(), f"{name}, place {index}"
            continue
        reached += 1
        X = stack.X[k].detach().double().requires_grad_()
        orthonormal(X, stack.signs[k].double()).backward(R.grad.double())
        for letter, want in (("X", X.grad), ("W", W.grad), ("b", b.grad)):
            got = getattr(stack, letter).grad
            assert got is not None, f"{name}, place {index}: {letter} has no gradient"
            close(got[k], want, GRADIENTS, f"{name}, place {index}, {letter}")
    assert reached, f"{name}: no gradient reaches any place"


def generated(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Greedy tokens and their logits."""
    torch.manual_seed(4)
    with torch.no_grad(), calm():
        out = model.generate(
            **batch,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return out.sequences, torch.stack(out.logits, 1)


def check_generate(family: Family, seed: int = 7) -> None:
    """Greedy generation as under hooks that edit the prompt and nothing after it."""
    base = base_of(family)
    settings = base.generation_config
    settings.eos_token_id = settings.forced_eos_token_id = settings.forced_bos_token_id = None
    settings.suppress_tokens = settings.begin_suppress_tokens = None
    settings.pad_token_id = 0
    if family.kind == "vision-language":  # a placeholder of an image must not be generated
        settings.suppress_tokens = list(range(88, 97))
    whole = family.inputs("left", 2) or family.inputs("right", 2)
    batch = without(whole, "decoder_input_ids")
    try:
        before, _ = generated(copy.deepcopy(base), batch)
    except Exception as error:
        raise BaseFails(f"generate: {type(error).__name__}: {str(error)[:200]}") from error
    model = shake(attach(copy.deepcopy(base), family.component).eval(), seed)
    at = places(base, family.role(), family.count)
    weights = weights_of(layers_in(model, widths_of(base, at, whole)))
    tokens = edited_tokens(family, batch)
    once = family.kind not in ("encoder-decoder", "audio")
    with plain_edits(base, at, weights, tokens, family.layout, pads=family.pads, prompt_only=once):
        want, want_logits = generated(base, batch)
    for _ in range(2):  # a second call starts anew
        got, logits = generated(model, batch)
        close(logits[:, 0], want_logits[:, 0], ROWS, "the first token's logits")
        assert torch.equal(got, want), f"tokens {got.tolist()}, expected {want.tolist()}"
        close(logits, want_logits, ROWS, "the tokens' logits")
    assert before.shape == got.shape


def check_save(family: Family, seed: int = 7) -> None:
    """A reloaded adapter gives the same bits; a disabled one gives the base model's."""
    base = base_of(family)
    model = shake(attach(base_of(family), family.component).eval(), seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(base_of(family), folder).eval()
    batch = batches(family)[0]
    with torch.no_grad(), calm():
        want, got = (meaningful(family, batch, leading(call(m, batch))) for m in (model, again))
        for own, other in zip(stacks(model), stacks(again), strict=True):
            for p, q in zip(own.parameters(), other.parameters(), strict=True):
                assert torch.equal(p, q), "a parameter changed on the way to disk and back"
        close(got, want, 5e-6, "a reloaded adapter")
        with model.disable_adapter():
            off = leading(call(model, batch))
        plain = leading(call(base, batch))
        close(*(meaningful(family, batch, t) for t in (off, plain)), 5e-6, "a disabled adapter")


def refusal(family: Family) -> str:
    """The message with which the library refuses the family; empty where it attaches."""
    try:
        attach(base_of(family), family.component)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return ""


def check_refused(family: Family, seed: int = 7) -> None:
    """The library names the family and says why it cannot serve it."""
    message = refusal(family)
    assert message, "attached, but the catalogue expects a refusal"
    assert family.refused in message, f"refused, but says {message}"


from tests.families import modes  # noqa: E402  (its checks use what stands above)

CHECKS: dict[str, Callable[..., None]] = {
    "places": check_places,
    "identity": check_identity,
    "rows": check_rows,
    "gradients": check_gradients,
    "generate": check_generate,
    "save": check_save,
    "checkpointing": modes.check_checkpointing,
    "compile": modes.check_compile,
}


def checks_of(family: Family) -> list[str]:
    """The names of the family's checks."""
    if family.refused:
        return ["refused"]
    left_out = set() if family.generates else {"generate"}
    left_out |= set() if family.name in modes.COMPILED else {"compile"}
    return [name for name in CHECKS if name not in left_out]


def routed(model: nn.Module) -> bool:
    """Whether a router chooses experts: at a tie, rounding alone can change its choice."""
    return any("expert" in name or "router" in name for name, _ in model.named_modules())


def run(family: Family, name: str) -> None:
    """One check of one family; routers have three draws of the adapter, the others one."""
    function = check_refused if name == "refused" else CHECKS[name]
    for seed in (7, 8, 9):
        try:
            return function(family, seed)
        except AssertionError:
            if seed == 9 or name in ("places", "refused") or not routed(_base(family.name)):
                raise


__all__ = ["CHECKS", "BaseFails", "MissingClass", "attach", "checks_of", "decoder_tokens", "run"]
