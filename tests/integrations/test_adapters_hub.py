"""``accelerate_adapters``: the results of the package, except where the package is incorrect."""

from __future__ import annotations

import contextlib
import copy
import re

import pytest
import torch

adapters = pytest.importorskip(
    "adapters", reason="needs the package adapters (with transformers 4.57.6)"
)

from adapters import AdapterSetup, DiReftConfig, LoReftConfig, NoReftConfig, Parallel  # noqa: E402
from adapters.methods.reft import ReftLayer  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from reft_kernels.integrations.adapters import accelerate_adapters  # noqa: E402
from reft_kernels.interventions import base  # noqa: E402
from reft_kernels.parametrization import orthonormality_error  # noqa: E402
from tests.model.families import (  # noqa: E402
    LENGTH,
    VOCAB,
    hook_count,
    make,
    mask_of,
    plain_hooks,
    shake,
    within,
)

BOTH = {"prefix_positions": 7, "suffix_positions": 7, "r": 4, "dropout": 0.0}
CONFIGS = {
    "loreft": LoReftConfig(**BOTH, tied_weights=True),
    "loreft-untied": LoReftConfig(**BOTH),
    "loreft-prefix": LoReftConfig(r=3, dropout=0.0),
    "loreft-suffix": LoReftConfig(
        prefix_positions=0, suffix_positions=5, r=1, dropout=0.0, tied_weights=True
    ),
    "loreft-gelu": LoReftConfig(**BOTH, non_linearity="gelu"),
    "loreft-full-rank": LoReftConfig(**(BOTH | {"r": 32}), tied_weights=True),
    "noreft": NoReftConfig(**BOTH, tied_weights=True),
    "noreft-untied": NoReftConfig(**BOTH, layers=[0, 2]),
    "noreft-relu": NoReftConfig(**BOTH, non_linearity="relu"),
    "direft": DiReftConfig(**BOTH, tied_weights=True),
    "direft-untied": DiReftConfig(**BOTH),
}


def hub(family: str = "llama", config=CONFIGS["loreft"], seed: int = 3) -> torch.nn.Module:
    """Return a model of the package with one active adapter that has random weights."""
    model = make(family)
    adapters.init(model)
    add(model, "a", config, seed)
    model.train_adapter("a")
    return model.eval()


def add(model, name, config, seed):
    torch.manual_seed(seed)
    model.add_adapter(name, config=config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f".refts.{name}." in path:
                # only the transposed part below the diagonal of R's parameter is trained
                noise = 0.2 * torch.randn_like(parameter)
                parameter.add_(noise.triu(1) if path.endswith("original") else noise)


def layers(model) -> list[ReftLayer]:
    return [m for m in model.modules() if isinstance(m, ReftLayer)]


def inputs_of(lengths: list[int], side: str = "right") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = mask_of(lengths, "left" if side == "left" else "right")
    ids = torch.randint(3, VOCAB, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    """Return the logits of real tokens, and every gradient of a loss on them."""
    model.zero_grad()
    logits = model(**inputs).logits
    if logits.dim() == 3:
        logits = logits[inputs["attention_mask"].bool()]
    target = torch.arange(logits.shape[0]) % logits.shape[-1]
    F.cross_entropy(logits, target).backward()
    results = {
        n: p.grad.clone()
        for n, p in model.named_parameters()
        if p.requires_grad and p.grad is not None
    }
    return {"logits": logits.detach(), **results}


def exactly(model, inputs) -> dict[str, torch.Tensor]:
    """Return the same in fp64, computed by the package."""
    torch.set_default_dtype(torch.float64)  # the package creates empty tensors in this dtype
    try:
        cast = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
        return gradients(copy.deepcopy(model).double(), cast)
    finally:
        torch.set_default_dtype(torch.float32)


def check_budget(drawn: list[tuple[dict, dict, dict]]) -> None:
    """Check (ours, the package's, exact) against the budget of :mod:`tests.budget`.

    Tensors of several layers count as several draws.
    """
    results: dict[str, list[tuple[float, float, float]]] = {}
    for ours, theirs, exact in drawn:
        assert ours.keys() == theirs.keys() == exact.keys()
        for name, want in exact.items():
            errors = ((got[name].double() - want).abs().max().item() for got in (ours, theirs))
            results.setdefault(re.sub(r"\d+", "N", name), []).append(
                (*errors, want.abs().max().item())
            )
    eps = torch.finfo(drawn[0][0]["logits"].dtype).eps
    for name, rows in results.items():
        error, straightforward, size = map(max, zip(*rows, strict=True))
        assert (
            error
            <= 2 * straightforward
            + (eps if name == "logits" else torch.finfo(torch.float32).eps) * size
        ), name


def compare(family, config, inputs, context=contextlib.nullcontext) -> None:
    drawn = []
    for seed in range(8):
        model = hub(family, config, seed)
        exact = exactly(model, inputs)
        with context():
            theirs = gradients(model, inputs)
            accelerate_adapters(model)
            drawn.append((gradients(model, inputs), theirs, exact))
    assert len(drawn[0][0]) > 1
    check_budget(drawn)


@pytest.mark.parametrize("lengths", [[LENGTH] * 3, [LENGTH, 15, 9]], ids=["full", "right-padded"])
@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", c) for c in CONFIGS]
    + [(f, c) for f in ("bert", "gpt2") for c in ("loreft", "noreft-untied", "direft")],
)
def test_outputs_and_gradients_are_the_packages(family, config, lengths):
    compare(family, CONFIGS[config], inputs_of(lengths))


def test_an_encoder_and_a_decoder_and_images_without_tokens():
    inputs = inputs_of([LENGTH] * 3)
    compare(
        "t5", CONFIGS["loreft-prefix"], inputs | {"decoder_input_ids": inputs["input_ids"].flip(1)}
    )
    compare("vit", CONFIGS["loreft"], {"pixel_values": torch.randn(3, 3, 16, 16)})


# cases in which the package is incorrect


def prompt_columns(mask: torch.Tensor, first: int, last: int) -> list[list[int]]:
    results = []
    for row in mask:
        real = row.nonzero().flatten().tolist()
        results.append(sorted({*real[:first], *real[max(0, len(real) - last) :]}))
    return results


@contextlib.contextmanager
def reference(model, columns, family="llama"):
    """Return the model edited by plain hooks at the given columns instead of by the package."""
    units = [layer.refts["a"].units[0] for layer in layers(model)]

    def weights(layer):
        unit = units[layer]
        return unit.projection.weight, unit.learned_source.weight, unit.learned_source.bias

    with AdapterSetup(None), plain_hooks(family, model, lambda hidden: columns, weights):
        yield


def decode(family, model, inputs, columns, count=5):
    """Decode greedily without a cache and edit the prompt's columns at every step.

    Returns:
        The tokens and the logits of each step.
    """
    ids, mask, logits = inputs["input_ids"], inputs["attention_mask"], []
    with torch.no_grad(), reference(model, columns, family):
        for _ in range(count):
            position_ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
            logits.append(
                model(input_ids=ids, attention_mask=mask, position_ids=position_ids).logits[:, -1]
            )
            ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
    return ids, torch.stack(logits)


DECODING = {
    "max_new_tokens": 5,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}


CASES = [("llama", "loreft", "full"), ("llama", "loreft", "left"), ("gpt2", "loreft", "left")]
CASES += [("llama", "loreft-suffix", "left"), ("llama", "loreft-prefix", "left")]


@pytest.mark.parametrize(("family", "config", "side"), CASES)
def test_decoding_steps_come_out_right_where_the_package_fails(family, config, side):
    config, inputs = (
        CONFIGS[config],
        inputs_of([LENGTH] * 3 if side == "full" else [LENGTH, 17, 10], side),
    )
    model = hub(family, config)
    model.generation_config.eos_token_id = None
    columns = prompt_columns(
        inputs["attention_mask"], config.prefix_positions, config.suffix_positions
    )
    tokens, plain = decode(family, model, inputs, columns)
    _, exact = decode(family, copy.deepcopy(model).double(), inputs, columns)

    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        model.generate(**inputs, **DECODING)
    if config.suffix_positions:  # without a cache, the suffix moves with the generated tokens
        theirs = model.generate(**inputs, **DECODING, use_cache=False)
        assert not within(torch.stack(theirs.logits[1:]), plain[1:], exact[1:])

    accelerate_adapters(model)
    # chunked prefill of transformers is inexact with padding, even without edits
    for setting in [
        {},
        {"use_cache": False},
        *([{"prefill_chunk_size": 5}] if side == "full" else []),
    ]:
        ours = model.generate(**inputs, **DECODING, **setting)
        assert torch.equal(ours.sequences, tokens)
        assert within(torch.stack(ours.logits), plain, exact)


def test_a_prompt_shorter_than_asked_is_edited_where_the_package_fails():
    inputs, model = inputs_of([LENGTH, 15, 4]), hub()
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        model(**inputs)
    columns, real = prompt_columns(inputs["attention_mask"], 7, 7), inputs["attention_mask"].bool()
    results = []
    with torch.no_grad():
        for subject in (model, copy.deepcopy(model).double()):
            with reference(subject, columns):
                results.append(subject(**inputs).logits[real])
        accelerate_adapters(model)
        assert within(model(**inputs).logits[real], *results)


def test_weight_decay_leaves_r_orthonormal_and_the_package_reads_it(tmp_path):
    inputs, model = inputs_of([LENGTH] * 3), hub()
    model.train()

    def train():
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5
        )
        for _ in range(3):
            optimizer.zero_grad()
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
        model.eval()

    start = copy.deepcopy(model.state_dict())
    train()
    # weight decay turns the package's R into zeros
    assert all((layer.refts["a"].units[0].projection.weight == 0).all() for layer in layers(model))
    model.load_state_dict(start)
    handle = accelerate_adapters(model.train())
    train()
    edited = model(**inputs).logits
    model.save_adapter(str(tmp_path), "a")
    fresh = make("llama")
    adapters.init(fresh)
    fresh.set_active_adapters(fresh.load_adapter(str(tmp_path)))
    handle.restore()
    for subject in (model, fresh.eval()):
        assert all(
            orthonormality_error(layer.refts["a"].units[0].projection.weight) <= 1e-5
            for layer in layers(subject)
        )
        torch.testing.assert_close(subject(**inputs).logits, edited)


@pytest.mark.parametrize("config", ["loreft", "noreft-untied", "direft", "loreft-gelu"])
def test_half_precision(config):
    compare(
        "llama",
        CONFIGS[config],
        inputs_of([LENGTH, 15, 14]),
        lambda: torch.autocast("cpu", torch.bfloat16),
    )


def test_a_model_in_bf16_needs_no_autocast():
    inputs, model = inputs_of([LENGTH, 15, 14]), hub()
    for name, parameter in model.named_parameters():
        if ".refts." not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        model(**inputs)
    accelerate_adapters(model)
    results = gradients(model, inputs)
    assert results["logits"].dtype == torch.bfloat16 and all(
        t.isfinite().all() for t in results.values()
    )


@pytest.mark.parametrize("tied", [True, False])
def test_dropout_is_the_packages_draw_for_draw(tied):
    inputs, drawn = inputs_of([LENGTH] * 3), []
    for seed in range(8):
        model = hub("llama", LoReftConfig(**(BOTH | {"dropout": 0.3}), tied_weights=tied), seed)
        still = gradients(model, inputs)
        results = []
        for run in (exactly, gradients):
            torch.manual_seed(seed)
            results.append(run(model.train(), inputs))
        assert not torch.allclose(still["logits"], results[1]["logits"])
        accelerate_adapters(model)
        torch.manual_seed(seed)
        drawn.append((gradients(model, inputs), *reversed(results)))
    check_budget(drawn)


# behaviour that is the same as the package's


def test_parameters_and_files_stay_the_packages(tmp_path):
    inputs, model = inputs_of([LENGTH, 15, 9]), hub()
    before = dict(model.named_parameters())
    keys, hooks = list(model.state_dict()), hook_count(model)
    model.save_adapter(str(tmp_path / "theirs"), "a")
    expected = gradients(model, inputs)  # after saving, which changes the layout of buffers
    handle = accelerate_adapters(model)
    assert list(model.state_dict()) == keys
    assert all(p is before[n] for n, p in model.named_parameters())
    model.save_adapter(str(tmp_path / "ours"), "a")
    assert (tmp_path / "theirs/adapter_config.json").read_text() == (
        tmp_path / "ours/adapter_config.json"
    ).read_text()
    theirs, ours = (
        torch.load(tmp_path / who / "pytorch_adapter.bin", weights_only=True)
        for who in ("theirs", "ours")
    )
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in theirs)
    gradients(model, inputs)
    assert handle.restore() is model
    assert hook_count(model) == hooks and "generate" not in model.__dict__
    assert not any("forward" in layer.__dict__ for layer in layers(model))
    assert all(torch.equal(t, expected[n]) for n, t in gradients(model, inputs).items())
    handle.restore()


def test_active_adapters_are_those_of_the_package():
    inputs, model = inputs_of([LENGTH, 15, 9]), hub()
    real = inputs["attention_mask"].bool()
    handle = accelerate_adapters(model)
    add(model, "b", CONFIGS["direft-untied"], 9)  # added after acceleration

    @torch.no_grad()
    def run(context=None):
        with context or contextlib.nullcontext():
            return model(**inputs).logits[real]

    def each():
        results = []
        for name in ("a", "b", None):
            model.set_active_adapters(name)
            results += [run(), run(AdapterSetup("b"))]
        model.set_active_adapters("a")
        return results

    ours = each()
    handle.restore()
    theirs = each()
    model.double()
    exact = each()
    assert all(within(*three) for three in zip(ours, theirs, exact, strict=True))
    assert (
        not torch.allclose(ours[0], ours[2])
        and not torch.allclose(ours[0], ours[4])
        and torch.equal(ours[1], ours[2])
    )
    model.float()
    accelerate_adapters(model)
    model.delete_adapter("a")
    assert torch.equal(run(), ours[4])


def test_prompts_end_as_given_by_the_caller_or_the_labels():
    inputs, lengths = inputs_of([LENGTH, 20, 16]), [16, 15, 14]
    model, real = hub(), inputs["attention_mask"].bool()
    labels = inputs["input_ids"].masked_fill(~real, -100)
    for row, length in enumerate(lengths):
        labels[row, :length] = -100
    columns = prompt_columns(mask_of(lengths), 7, 7)
    results = []
    for subject in (model, copy.deepcopy(model).double()):
        with torch.no_grad(), reference(subject, columns):
            results.append(subject(**inputs).logits[real])
    with torch.no_grad():
        with accelerate_adapters(model):
            whole = model(**inputs, labels=labels).logits[real]
            assert torch.equal(whole, model(**inputs).logits[real])
            assert within(model(**inputs, prompt_lengths=lengths).logits[real], *results)
        with accelerate_adapters(model, prompts="labels"):
            said = model(**inputs, labels=labels).logits[real]
    assert within(said, *results) and not torch.allclose(said, whole)


def test_gradient_checkpointing_and_a_copy():
    inputs, model = inputs_of([LENGTH, 15, 9]), hub().train()
    accelerate_adapters(model)
    expected = gradients(model, inputs)
    other = copy.deepcopy(model)
    shake(model, 1.0)
    for _ in range(2):
        got = gradients(other, inputs)
        assert all(torch.equal(got[name], expected[name]) for name in expected)
        other.gradient_checkpointing_enable()


def test_one_launch_for_a_layers_rows_none_while_decoding_and_no_stale_weights(monkeypatch):
    calls = []
    edit = base.apply_edit
    monkeypatch.setattr(base, "apply_edit", lambda *a: calls.append(1) or edit(*a))
    inputs, model = inputs_of([LENGTH, 17, 10], "left"), hub()
    accelerate_adapters(model)
    first = model.generate(**inputs, **DECODING).logits[0]
    assert len(calls) == len(layers(model))
    assert torch.equal(model.generate(**inputs, **DECODING).logits[0], first)
    shake(model, 0.1)
    assert not torch.allclose(model.generate(**inputs, **DECODING).logits[0], first)


# errors


def test_wrong_arguments_are_named_and_change_nothing():
    with pytest.raises(ValueError, match="model: got LlamaForCausalLM without ReFT layers"):
        accelerate_adapters(make("llama"))
    model = hub()
    with pytest.raises(ValueError, match="prompts: got 'all', expected one of"):
        accelerate_adapters(model, prompts="all")
    with accelerate_adapters(model), pytest.raises(ValueError, match="accelerated already"):
        accelerate_adapters(model)
    hooks = hook_count(model)
    add(model, "c", LoReftConfig(non_linearity="mish"), 1)
    with pytest.raises(ValueError, match="non_linearity: adapter 'c': activation: got 'mish'"):
        accelerate_adapters(model)
    assert hook_count(model) == hooks and not any(
        "forward" in layer.__dict__ for layer in layers(model)
    )
    model.delete_adapter("c")
    add(model, "b", CONFIGS["loreft"], 2)
    accelerate_adapters(model)
    with (
        AdapterSetup(Parallel("a", "b")),
        pytest.raises(ValueError, match="expected no Parallel block"),
    ):
        model(**inputs_of([LENGTH] * 3))
