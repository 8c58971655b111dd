"""Generated answers: the same for a prompt whatever the batch, as long as they may be, by these
settings alone.
"""

from __future__ import annotations

import pytest
import torch
from reft_train.evaluation.generating import Decode, context_window, encode_prompts, generate
from reft_train.tasks.base import Decoding

from tests.reft_train.evaluation.conftest import CAPITALS, adapted, settings

METHODS = ("loreft", "lora", "prefix")


def answers(loaded, decode, batch_size=4, prompts=CAPITALS):
    ids = encode_prompts(prompts, loaded.tokenizer, loaded.kind, decode, 96)
    return generate(
        loaded.model, loaded.tokenizer, loaded.kind, ids, decode, batch_size, progress=False
    )


def alone(loaded, prompt, new_tokens):
    """What a loop of argmax over whole sequences says, without padding and without a cache."""
    ids = torch.tensor(
        [encode_prompts([prompt], loaded.tokenizer, loaded.kind, Decode(new_tokens), 96)[0]]
    )
    width = ids.shape[1]
    loaded.model.eval()
    with torch.no_grad():
        for _ in range(new_tokens):
            logits = loaded.model(input_ids=ids, prompt_lengths=[width], use_cache=False).logits
            following = logits[:, -1].argmax(-1, keepdim=True)
            if following.item() == loaded.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, following], dim=1)
    return loaded.tokenizer.decode(ids[0, width:], skip_special_tokens=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_size", [2, 7])
def test_greedy_answers_do_not_depend_on_the_batch(method, batch_size, tiny_llama):
    _, loaded = adapted(tiny_llama, method=method)
    decode = Decode(8)
    assert answers(loaded, decode, batch_size) == [
        answers(loaded, decode, 1, [prompt])[0] for prompt in CAPITALS
    ]


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_changes_the_answers(method, tiny_llama):
    _, loaded = adapted(tiny_llama, method=method)
    changed = answers(loaded, Decode(8))
    with loaded.model.disable_adapter():
        assert answers(loaded, Decode(8)) != changed


def test_greedy_answers_are_those_of_argmax(loreft):
    _, loaded = loreft
    assert answers(loaded, Decode(8)) == [alone(loaded, prompt, 8) for prompt in CAPITALS]


def test_an_encoder_decoder_answers_alike_in_every_batch(tiny_t5):
    _, loaded = adapted(tiny_t5)
    decode = Decode(8)
    assert answers(loaded, decode, 7) == [
        answers(loaded, decode, 1, [prompt])[0] for prompt in CAPITALS
    ]


def test_an_encoder_decoder_answers_with_no_start_token_and_as_many_tokens_as_asked(tiny_t5):
    _, loaded = adapted(tiny_t5)
    loaded.model.get_base_model().generation_config.eos_token_id = None
    loaded.tokenizer.eos_token = "[never]"
    base = loaded.model.get_base_model()
    inputs = torch.tensor([loaded.tokenizer(CAPITALS[0]).input_ids])
    ids = torch.tensor([[base.config.decoder_start_token_id]])
    loaded.model.eval()
    with torch.no_grad():
        for _ in range(5):
            logits = loaded.model(input_ids=inputs, decoder_input_ids=ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    expected = loaded.tokenizer.decode(ids[0, 1:], skip_special_tokens=True)
    prompts = [inputs[0].tolist()]
    assert generate(
        loaded.model, loaded.tokenizer, "seq2seq", prompts, Decode(5), 1, progress=False
    ) == [expected]


def test_an_answer_ends_at_the_end_token(loreft):
    _, loaded = loreft
    whole = generate_ids(loaded, 8)
    loaded.tokenizer.eos_token = loaded.tokenizer.convert_ids_to_tokens(whole[3])
    expected = loaded.tokenizer.decode(whole[: whole.index(whole[3])], skip_special_tokens=True)
    assert answers(loaded, Decode(8), prompts=CAPITALS[:1]) == [expected]


def generate_ids(loaded, new_tokens):
    ids = torch.tensor(
        [encode_prompts(CAPITALS[:1], loaded.tokenizer, loaded.kind, Decode(new_tokens), 96)[0]]
    )
    loaded.model.eval()
    output = loaded.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
    )
    return output[0, ids.shape[1] :].tolist()


def test_the_models_own_decoding_habits_are_left_out_and_come_back(loreft):
    _, loaded = loreft
    expected = answers(loaded, Decode(8))
    habits = loaded.model.get_base_model().generation_config
    habits.repetition_penalty, habits.do_sample, habits.temperature, habits.max_new_tokens = (
        5.0,
        True,
        9.0,
        1,
    )
    assert answers(loaded, Decode(8)) == expected
    assert (
        loaded.model.get_base_model().generation_config is habits
        and habits.repetition_penalty == 5.0
    )


def test_drawn_answers_repeat_with_the_seed_and_leave_the_generator_alone(loreft):
    _, loaded = loreft
    before = torch.get_rng_state()
    drawn = [answers(loaded, Decode(8, temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tiny_nucleus_draws_the_likeliest_token(loreft):
    _, loaded = loreft
    assert answers(loaded, Decode(8, temperature=1.0, top_p=1e-6)) == answers(loaded, Decode(8))


def test_beams_do_not_depend_on_the_batch(loreft):
    _, loaded = loreft
    decode = Decode(6, num_beams=3)
    assert answers(loaded, decode, 7) == [
        answers(loaded, decode, 1, [prompt])[0] for prompt in CAPITALS
    ]


def test_every_module_gets_its_own_mode_back(loreft):
    _, loaded = loreft
    loaded.model.train()
    frozen = loaded.model.get_base_model().model.layers[0]
    frozen.eval()
    before = [module.training for module in loaded.model.modules()]
    answers(loaded, Decode(1))
    assert (
        [module.training for module in loaded.model.modules()] == before
        and True in before
        and False in before
    )


def test_a_limit_of_prompt_and_answer_cuts_each_answer_to_its_own_room(loreft):
    _, loaded = loreft
    free = Decode(8)
    prompts = encode_prompts(CAPITALS, loaded.tokenizer, loaded.kind, free, 96)
    limit = max(map(len, prompts)) + 2
    short = generate(
        loaded.model, loaded.tokenizer, loaded.kind, prompts, Decode(8, limit), 7, progress=False
    )
    for prompt, cut in zip(prompts, short, strict=True):
        room = min(8, limit - len(prompt))
        whole = generate(
            loaded.model, loaded.tokenizer, loaded.kind, [prompt], Decode(room), 1, progress=False
        )
        assert [cut] == whole


def test_settings_win_over_the_tasks_decoding(tiny_llama):
    task = Decoding(max_new_tokens=99, max_total_tokens=400)
    given = settings(tiny_llama, max_new_tokens=7, temperature=0.5, top_p=0.9, num_beams=2, seed=3)
    assert Decode.of(given, task) == Decode(7, 400, 0.5, 0.9, 2, 3)
    assert Decode.of(given.replace(max_new_tokens=None), task, window=300) == Decode(
        99, 300, 0.5, 0.9, 2, 3
    )


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(None, 96), (1000, 96), (100, 90), (12, 6)],
    ids=["none", "wide", "narrow", "tiny"],
)
def test_a_prompt_leaves_room_for_its_answer(limit, expected, loreft):
    decode = Decode(10, limit)
    (ids,) = encode_prompts(["word " * 300], loreft[1].tokenizer, "causal", decode, 96)
    assert len(ids) == expected and ids[0] == loreft[1].tokenizer.bos_token_id
    assert limit is None or decode.answer_room(len(ids)) == min(10, limit - expected)


def test_a_trained_prefix_takes_its_part_of_the_window(tiny_llama):
    assert context_window(adapted(tiny_llama)[1].model, "causal") == 512
    assert (
        context_window(adapted(tiny_llama, method="prefix", prefix_tokens=20)[1].model, "causal")
        == 492
    )
