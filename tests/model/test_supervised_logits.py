"""Logits of supervised tokens only: loss and gradients are those of all logits."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from reft_kernels.integrations.peft import ReftConfig, keep_supervised_logits, share_build
from reft_kernels.model import SupervisedLogits
from reft_kernels.model.supervised_logits import find_causal_lm, supervised_tokens
from tests.model.families import COMMON, DECODERS, SPECIAL, VOCAB, batch, make, shake

PADDED = [
    (family, side)
    for family in DECODERS
    for side in ("right", "left")
    # its own gradients are NaN with padding on the left; in transformers 4, no logits_to_keep
    if (family, side) != ("bloom", "left")
    and (int(transformers.__version__.split(".")[0]) >= 5 or family != "bloom")
]


def _gemma2():
    config = transformers.Gemma2Config(
        **COMMON,
        **SPECIAL,
        intermediate_size=64,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.1,
    )
    return transformers.Gemma2ForCausalLM(config)


def _mixtral():
    config = transformers.MixtralConfig(
        **COMMON,
        **SPECIAL,
        intermediate_size=64,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    )
    model = transformers.MixtralForCausalLM(config)
    model.config._experts_implementation = "eager"  # the others have no fp64
    return model


def adapt(base, **config):
    """An adapter in fp64, so that the order of summation hardly matters."""
    model = get_peft_model(base, ReftConfig(rank=4, **config))
    shake(model)
    return model.double().train()


def build(family: str = "llama", **config):
    torch.manual_seed(0)
    own = {"gemma2": _gemma2, "mixtral": _mixtral}
    return adapt(own[family]() if family in own else make(family), **config)


def losses_and_gradients(model, *calls):
    """Losses of the calls, and the gradients of their sum."""
    model.zero_grad(set_to_none=True)
    losses = [model(**inputs).loss for inputs in calls]
    sum(losses).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert found
    return [loss.detach() for loss in losses], found


def assert_same(got, want):
    for ours, plain in zip(got[0], want[0], strict=True):
        assert torch.allclose(ours, plain, rtol=1e-6, atol=0, equal_nan=True)
    assert got[1].keys() == want[1].keys()
    for name, plain in want[1].items():
        assert (got[1][name] - plain).abs().max() <= 1e-6 * plain.abs().max(), name


def compare(model, *calls):
    want = losses_and_gradients(model, *calls)
    with SupervisedLogits(model):
        got = losses_and_gradients(model, *calls)
    assert_same(got, want)


class HeadInput:
    """Number of tokens that enter the output layer in each of its calls."""

    def __init__(self, model):
        self.counts: list[int] = []
        model.get_output_embeddings().register_forward_pre_hook(self._record)

    def _record(self, module, args):
        self.counts.append(args[0].shape[:-1].numel())


# ---- loss and gradients


@pytest.mark.parametrize(("family", "side"), PADDED)
def test_loss_and_gradients_of_a_padded_batch(family, side):
    compare(build(family), batch(family, side=side))


def test_softcapped_logits():
    model = build("gemma2")
    logits = model(**batch("llama")).logits
    assert 0.05 < logits.abs().max() < 0.1  # the cap matters
    compare(model, batch("llama"))


def test_the_auxiliary_loss_of_experts_is_that_of_all_tokens():
    model, inputs = build("mixtral"), batch("llama")
    assert model(**inputs).aux_loss > 0
    compare(model, inputs)
    with SupervisedLogits(model):
        kept = model(**inputs)
    assert torch.equal(kept.aux_loss, model(**inputs).aux_loss)


def test_packed_rows():
    ids = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    places = torch.cat([torch.arange(11), torch.arange(13)]).expand(2, -1)
    labels = ids.where((places > 6) & (places < 12), -100)
    inputs = {"input_ids": ids, "position_ids": places, "labels": labels, "use_cache": False}
    compare(build(), inputs)


@pytest.mark.parametrize("count", [7, torch.tensor(7)], ids=["int", "tensor"])
def test_the_number_of_items_of_several_batches(count):
    calls = [batch("llama", seed=seed) | {"num_items_in_batch": count} for seed in range(3)]
    compare(build(), *calls)


def test_without_supervised_tokens():
    inputs = batch("llama")
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    compare(build(), inputs | {"num_items_in_batch": 5})
    model = build()
    with SupervisedLogits(model):
        assert model(**inputs).loss.isnan()  # the mean over no tokens, as without
    assert model(**inputs).loss.isnan()


def test_another_ignored_label():
    inputs = batch("llama")
    inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == -100, 0)
    compare(build(), inputs | {"ignore_index": 0, "prompt_lengths": [18, 9, 4]})


def test_explicit_arguments_and_embeddings():
    model, inputs = build(), batch("llama")
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    compare(model, inputs | {"inputs_embeds": embeddings, "prompt_lengths": [5, 5, 5]})


def test_positional_arguments():
    model, inputs = build(), batch("llama")
    head = HeadInput(model)
    plain = model.get_base_model()
    want = plain(**inputs).loss
    with SupervisedLogits(model):
        got = plain(
            inputs["input_ids"], inputs["attention_mask"], None, None, None, inputs["labels"]
        )
    assert torch.allclose(got.loss, want, rtol=1e-6) and head.counts[1] < head.counts[0]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_gradient_checkpointing(reentrant):
    model = build()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    compare(model, batch("llama"), batch("llama", seed=2))


def test_one_build_for_several_forwards():
    model, calls = build(), [batch("llama", seed=seed) for seed in range(3)]
    want = losses_and_gradients(model, *calls)
    model.zero_grad(set_to_none=True)
    with SupervisedLogits(model), share_build(model) as shared:
        losses = [model(**inputs).loss for inputs in calls]
        sum(losses).backward()
        shared.flush()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same(([loss.detach() for loss in losses], found), want)


def test_other_peft_methods():
    torch.manual_seed(0)
    model = get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj"], r=4)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.train()
    compare(model, batch("llama"))
    model = get_peft_model(model, ReftConfig(rank=4), adapter_name="reft").double().train()
    shake(model)
    compare(model, batch("llama"))


# ---- which logits are computed


def test_the_output_layer_sees_supervised_tokens_alone():
    model, inputs = build(), batch("llama")
    head = HeadInput(model)
    supervised = int((inputs["labels"][:, 1:] != -100).sum())
    with SupervisedLogits(model):
        output = model(**inputs)
    model(**inputs)
    assert head.counts == [supervised, inputs["labels"].numel()]
    assert output.logits is None and "logits" not in output


@pytest.mark.parametrize(
    "more",
    [
        {"labels": None},
        {"logits_to_keep": 3, "labels": None},
        {"logits_to_keep": torch.tensor([0, 2]), "labels": None},
        {"return_dict": False},
        {"shift_labels": torch.full((3, 24), 5)},
    ],
    ids=["no_labels", "last_tokens", "some_tokens", "tuple", "shifted_labels"],
)
def test_calls_with_all_logits(more):
    model, inputs = build(), batch("llama") | {"prompt_lengths": [18, 9, 4], **more}
    want = model(**inputs)
    with SupervisedLogits(model):
        got = model(**inputs)
    if "return_dict" in more:
        assert isinstance(got, tuple)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    else:
        assert torch.equal(got.logits, want.logits)


def test_evaluation_and_calls_without_gradients_compute_all_logits():
    model, inputs = build(), batch("llama")
    want = model(**inputs).logits
    with SupervisedLogits(model):
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, want)
        assert torch.equal(model.eval()(**inputs).logits, want)
        tokens = model.generate(inputs["input_ids"][:1], max_new_tokens=3, min_new_tokens=3)
        assert tokens.shape[1] == 24 + 3


def test_after_close_all_logits_are_computed():
    model, inputs = build(), batch("llama")
    base = model.get_base_model()
    before = base.__dict__["forward"], base.model.__dict__["forward"]
    kept = SupervisedLogits(model)
    kept.close()
    kept.close()
    assert (base.__dict__["forward"], base.model.__dict__["forward"]) == before
    assert model(**inputs).logits is not None
    with SupervisedLogits(model), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError
    assert model(**inputs).logits is not None


def test_a_wrapper_that_stays_computes_all_logits():
    base, inputs = make("llama").double(), batch("llama")
    kept = SupervisedLogits(base)
    model = adapt(base)  # wraps the forward once more
    assert model(**inputs).logits is None
    kept.close()
    assert model(**inputs).logits.shape == (3, 24, VOCAB)


def test_a_call_that_fails_leaves_nothing_behind():
    model, inputs = build(), batch("llama")
    with SupervisedLogits(model):
        with pytest.raises(ValueError, match="prompt_lengths"):
            model(**inputs, prompt_lengths=[99, 0, 0])
        with pytest.raises(ValueError, match=r"labels: got shape \(3, 20\), expected \(3, 24\)"):
            model(**inputs | {"labels": inputs["labels"][:, :20]}, prompt_lengths=[5, 5, 5])
        assert model(**inputs).logits is None
        with torch.no_grad():
            assert model(**inputs).logits.shape[:2] == (3, 24)


def test_a_call_inside_a_call():
    model, inputs = build(), batch("llama")
    inner = []

    def nested(module, args):
        if not inner:
            inner.append(None)
            with torch.no_grad():
                inner[0] = model(**inputs).logits

    model.get_base_model().model.layers[1].register_forward_pre_hook(nested)
    want = model(**inputs).loss
    inner.clear()
    with SupervisedLogits(model):
        got = model(**inputs)
    assert inner[0].shape == (3, 24, VOCAB)
    assert got.logits is None and torch.allclose(got.loss, want, rtol=1e-6)


def test_threads_have_their_own_calls():
    model = build()
    calls = [batch("llama", seed=seed) for seed in range(4)]
    want = [model(**inputs).loss for inputs in calls]
    got: dict[int, torch.Tensor] = {}

    def work(number):
        with torch.enable_grad():
            got[number] = model(**calls[number]).loss

    with SupervisedLogits(model):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, loss in enumerate(want):
        assert torch.allclose(got[number], loss, rtol=1e-6)


def test_compiled_calls_compute_all_logits():
    torch.compiler.reset()
    model, inputs = build(), batch("llama")
    want = losses_and_gradients(model, inputs)
    with SupervisedLogits(model):
        compiled = torch.compile(model, backend="aot_eager")
        assert compiled(**inputs).logits.shape == (3, 24, VOCAB)
        got = losses_and_gradients(compiled, inputs)
    names = {name.removeprefix("_orig_mod."): grad for name, grad in got[1].items()}
    assert_same((got[0], names), want)
    torch.compiler.reset()


# ---- what is refused


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("t5", "T5ForConditionalGeneration .*: it is an encoder-decoder model"),
        ("bert", "BertForSequenceClassification .*: its forward has no arguments labels and logi"),
    ],
)
def test_other_models_are_refused_and_stay_as_they_are(family, message):
    model = build(family)
    before = dict(model.get_base_model().__dict__)
    with pytest.raises(ValueError, match=message):
        keep_supervised_logits(model)
    assert model.get_base_model().__dict__ == before


def test_a_model_without_a_loss_function_is_refused():
    with pytest.raises(ValueError, match="model: got Linear, expected a transformers model"):
        keep_supervised_logits(torch.nn.Linear(2, 2))


class OwnLoss(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, logits_to_keep=0, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.loss = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )
        return output


class ShiftsItself(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, logits_to_keep=0, **kwargs):
        output = super().forward(input_ids, **kwargs)
        shifted = labels[:, 1:]
        output.loss = self.loss_function(
            output.logits[:, :-1], shifted, self.config.vocab_size, **kwargs
        )
        return output


class DropsKeywords(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, logits_to_keep=0, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.loss = self.loss_function(output.logits, labels, self.config.vocab_size)
        return output


@pytest.mark.parametrize("kind", [OwnLoss, ShiftsItself, DropsKeywords])
def test_a_loss_of_the_models_own_is_refused(kind):
    model = kind(make("llama").config)
    with pytest.raises(ValueError, match="does not pass labels and keyword arguments to loss_fun"):
        keep_supervised_logits(model)


def test_a_loss_function_without_shifted_labels_is_refused():
    model = make("llama")
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    with pytest.raises(ValueError, match="its loss_function has no argument shift_labels"):
        keep_supervised_logits(model)


def test_a_model_is_opened_once():
    model = build()
    with keep_supervised_logits(model), pytest.raises(ValueError, match="call close"):
        keep_supervised_logits(model)
    keep_supervised_logits(model).close()


def test_an_open_model_is_not_copied():
    model = build()
    with keep_supervised_logits(model), pytest.raises(TypeError, match=r"call close\(\) first"):
        copy.deepcopy(model)
    copy.deepcopy(model)


# ---- the selection


def test_supervised_tokens():
    labels = torch.tensor([[9, -100, 5, 6], [-100, 7, -100, -100]])
    tokens = supervised_tokens(labels)
    assert tokens.rows.tolist() == [1, 2, 4]  # the label of column 0 has no token before it
    assert tokens.targets.tolist() == [[5, 6, 7]] and tokens.shape == (2, 4)


def test_supervised_tokens_of_no_labels():
    tokens = supervised_tokens(torch.full((2, 3), -100))
    assert tokens.rows.tolist() == [0] and tokens.targets.tolist() == [[-100]]


def test_wrappers_are_unwrapped():
    base = make("llama")
    model = get_peft_model(base, ReftConfig(rank=4))
    assert find_causal_lm(model) is base
    assert find_causal_lm(torch.nn.DataParallel(model)) is base
