"""The checks of each family, compared with plain hooks."""

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
    """The base model without an adapter raises in this version of transformers."""


# ---- models


def _quiet(holder: Any, depth: int = 0) -> None:
    """Set dropout, layer drop, jitter and masking of a module or configuration to 0."""
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
    with torch.no_grad():  # biases of 0 and norms of 1 would hide errors
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))
            elif parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.15)
        for module in model.modules():  # sqrt(0) at padding tokens has an infinite gradient
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
    """A copy of the family's base model in evaluation mode.

    Raises:
        MissingClass: transformers does not have the model.
        BaseFails: the model cannot be created or does not run.
    """
    return copy.deepcopy(_base(family.name))


def attach(model: nn.Module, component: str, layers: Any = "all", **more: Any) -> PeftModel:
    """Attach an adapter of rank 4.

    Raises:
        BaseFails: PEFT cannot attach LoRA to this model either.
    """
    settings = {"layers": layers, "rank": 4, "positions": POSITIONS, "component": component, **more}
    config = ReftConfig(**settings)
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
    """The stacked interventions of the adapter, one per width."""
    return [m for m in model.modules() if type(m).__name__.startswith("Stacked")]


def shake(model: nn.Module, seed: int = 7, scale: float = 0.5) -> nn.Module:
    """Add noise to all adapter parameters."""
    noise = generator(seed)
    with torch.no_grad():
        for stack in stacks(model):
            for p in stack.parameters():
                fan = p.shape[-1] ** 0.5 if p.dim() > 2 else 1.0
                p.add_(scale * torch.randn(p.shape, generator=noise) / fan)
    return model


def widths_of(model: nn.Module, at: list[Place], batch: Batch) -> list[int]:
    """The width of the hidden state at each place, from a run of the base model."""
    widths = [0] * len(at)

    def note(index: int, hidden: Tensor) -> Tensor:
        widths[index] = hidden.shape[-1]
        return hidden

    with torch.no_grad(), on_hidden(model, at, note):
        model(**batch)
    return widths


def layers_in(model: nn.Module, widths: list[int]) -> list[tuple[nn.Module, int]]:
    """(stack, index in the stack) of each place; a stack has all places of one width in order."""
    layers, count = [], dict.fromkeys(widths, 0)
    by_width = {stack.W.shape[-1]: stack for stack in stacks(model)}
    for width in widths:
        layers.append((by_width[width], count[width]))
        count[width] += 1
    assert count == {width: stack.W.shape[0] for width, stack in by_width.items()}, count
    return layers


def weights_of(layers: list[tuple[nn.Module, int]], *, learn: bool = False) -> list[Weights]:
    """Copies of R, W and b of each place."""
    out = []
    for stack, k in layers:
        R = orthonormal(stack.X[k].detach().double(), stack.signs[k].double()).float()
        W, b = stack.W[k].detach().clone(), stack.b[k].detach().clone()
        out.append(Weights(*(t.requires_grad_(learn) for t in (R, W, b))))
    return out


# ---- batches and outputs


def batches(family: Family) -> list[Batch]:
    """Batches padded on the right, on the left, without padding, and of one example."""
    kinds = (("right", BATCH), ("left", BATCH), ("none", BATCH), ("none", 1))
    return [b for b in (family.inputs(*kind) for kind in kinds) if b is not None]


def leading(output: Any) -> Tensor:
    """The logits of an output, or its first floating-point tensor."""
    for name in ("logits", "logits_per_text", "last_hidden_state", "prediction_logits"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    return next(v for v in output.values() if isinstance(v, Tensor) and v.is_floating_point())


def meaningful(family: Family, batch: Batch, logits: Tensor) -> Tensor:
    """Logits without those at padding tokens."""
    mask = batch.get("attention_mask")
    if family.scores_tokens and mask is not None and logits.shape[:2] == mask.shape:
        return logits[mask.bool()]
    return logits


def distance(got: Tensor, want: Tensor) -> float:
    """The largest difference relative to the largest entry; infinite if shapes differ."""
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape:
        return float("inf")
    finite = torch.isfinite(want)
    if not torch.equal(torch.isfinite(got), finite):
        return float("inf")
    got, want = got[finite], want[finite]
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-9))


def close(got: Tensor, want: Tensor, limit: float, name: str) -> None:
    """Assert that :func:`distance` is at most ``limit``."""
    difference = distance(got, want)
    assert difference <= limit, f"{name}: differs by {difference:.1e}, allowed {limit:.0e}"


def edited_tokens(family: Family, batch: Batch) -> Tensor | None:
    return None if family.tokens is None else family.tokens(batch)


@contextlib.contextmanager
def calm():
    """Ignore warnings, such as those about unknown prompt ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def call(model: nn.Module, batch: Batch) -> Any:
    torch.manual_seed(4)  # for models with random numbers in their forward
    return model(**batch)


# ---- checks


def check_places(family: Family, seed: int = 7) -> None:
    """The component resolves to the modules in the catalogue."""
    model = base_of(family)
    want = places(model, family.role(), family.count)
    got = [(target.path, target.side) for target in resolve(model, family.component).targets]
    assert got == want, f"places {got}, expected {want}"


def check_identity(family: Family, seed: int = 7) -> None:
    """A new adapter does not change the logits."""
    base = base_of(family)
    model = attach(base_of(family), family.component).eval()
    with torch.no_grad(), calm():
        for batch in batches(family):
            got, want = (meaningful(family, batch, leading(call(m, batch))) for m in (model, base))
            close(got, want, IDENTITY, "a fresh adapter")


def labelled(family: Family) -> list[tuple[str, Batch, Batch, Tensor]]:
    """Batches with labels or prompt lengths.

    Returns:
        (name, batch for the edited model, batch for the base model, prompt tokens bool ``[B, T]``).
    """
    cases = []
    for padding in ("right", "left"):
        batch = family.inputs(padding, BATCH) if family.labels else None
        if batch is None:
            continue
        labels, prompt, lengths = mark_prompt(family, batch)
        if family.tokens is not None and family.tokens(batch).shape != prompt.shape:
            continue
        cases.append((f"labels, {padding}", {**batch, "labels": labels}, batch, prompt))
        if family.labels == "prompt":
            with_lengths = {**batch, "prompt_lengths": lengths}
            cases.append((f"prompt_lengths, {padding}", with_lengths, batch, prompt))
    return cases


def check_rows(family: Family, seed: int = 7, role: Role | None = None) -> None:
    """Logits equal those with plain hooks, for all paddings and prompt ends."""
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
    effect = 0.0
    for name, inputs, bare, tokens in cases + (labelled(family) if role.tokens else []):
        with torch.no_grad(), calm():
            with plain_edits(base, at, weights, tokens, family.layout, pads=family.pads) as ran:
                want = meaningful(family, bare, leading(call(base, bare)))
            assert ran, "no place ran"
            got = meaningful(family, bare, leading(call(model, inputs)))
            unedited = meaningful(family, bare, leading(call(base, bare)))
            effect = max(effect, distance(unedited, want))
        close(got, want, ROWS, name)
    assert effect > 1e-4, f"the edit barely changes the logits: {effect:.0e}"


def loss_of(family: Family, batch: Batch, output: Any) -> Tensor:
    """The loss of an output, or a fixed linear combination of the logits."""
    if getattr(output, "loss", None) is not None and "labels" in batch:
        return output.loss
    logits = meaningful(family, batch, leading(output)).float()
    return (logits * torch.randn(logits.shape, generator=generator(3))).sum() / logits.shape[0]


def check_gradients(family: Family, seed: int = 7, role: Role | None = None) -> None:
    """Gradients of all adapter parameters equal those of autograd through the plain hooks."""
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
    """Compare gradients; that of X is computed from R's through the reflections."""
    reached = 0
    for index in sorted(ran):
        (stack, k), (R, W, b) = layers[index], weights[index]
        if W.grad is None or not W.grad.any():  # the loss does not depend on this place
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
    """Greedily generated tokens and their logits."""
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
    """Greedy generation equals generation with hooks that edit only the prompt."""
    base = base_of(family)
    settings = base.generation_config
    settings.eos_token_id = settings.forced_eos_token_id = settings.forced_bos_token_id = None
    settings.suppress_tokens = settings.begin_suppress_tokens = None
    settings.pad_token_id = 0
    if family.kind == "vision-language":  # image placeholders must not be generated
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
    for _ in range(2):  # the second call must not depend on the first
        got, logits = generated(model, batch)
        close(logits[:, 0], want_logits[:, 0], ROWS, "the first token's logits")
        assert torch.equal(got, want), f"tokens {got.tolist()}, expected {want.tolist()}"
        close(logits, want_logits, ROWS, "the tokens' logits")
    assert before.shape == got.shape


def check_save(family: Family, seed: int = 7) -> None:
    """A reloaded adapter has the same parameters; a disabled one gives the base model's logits."""
    base = base_of(family)
    model = shake(attach(base_of(family), family.component).eval(), seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(base_of(family), folder).eval()
    batch = batches(family)[0]
    with torch.no_grad(), calm():
        want, got = (meaningful(family, batch, leading(call(m, batch))) for m in (model, again))
        for saved, loaded in zip(stacks(model), stacks(again), strict=True):
            for p, q in zip(saved.parameters(), loaded.parameters(), strict=True):
                assert torch.equal(p, q), "saving and loading changed a parameter"
        close(got, want, 5e-6, "a reloaded adapter")
        with model.disable_adapter():
            off = leading(call(model, batch))
        plain = leading(call(base, batch))
        close(*(meaningful(family, batch, t) for t in (off, plain)), 5e-6, "a disabled adapter")


def refusal(family: Family) -> str:
    """The library's error message for the family; empty if the adapter attaches."""
    try:
        attach(base_of(family), family.component)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return ""


def check_refused(family: Family, seed: int = 7) -> None:
    """The library raises an error with the reason in the catalogue."""
    message = refusal(family)
    assert message, "attached, but the catalogue expects an error"
    assert family.refused in message, f"unexpected error message: {message}"


from tests.families import modes  # noqa: E402  (it uses the functions above)

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
    omitted = set() if family.generates else {"generate"}
    omitted |= set() if family.name in modes.COMPILED else {"compile"}
    return [name for name in CHECKS if name not in omitted]


def routed(model: nn.Module) -> bool:
    """Whether the model routes tokens to experts; rounding can change the choice at a tie."""
    return any("expert" in name or "router" in name for name, _ in model.named_modules())


def run(family: Family, name: str) -> None:
    """Run one check of one family; models with routers have up to three attempts (seeds)."""
    function = check_refused if name == "refused" else CHECKS[name]
    for seed in (7, 8, 9):
        try:
            return function(family, seed)
        except AssertionError:
            if seed == 9 or name in ("places", "refused") or not routed(_base(family.name)):
                raise


__all__ = ["CHECKS", "BaseFails", "MissingClass", "attach", "checks_of", "decoder_tokens", "run"]
