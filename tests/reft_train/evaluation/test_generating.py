"""Generated answers: the same for a prompt whatever the batch, as long as they may be, by these
settings alone.
"""

from __future__ import annotations

import pytest
import torch
from reft_train import tasks
from reft_train.data.tokenizing import Encoder
from reft_train.evaluation.generating import context_window, generate
from reft_train.tasks.base import Decoding, Task

from tests.reft_train.evaluation.conftest import CAPITALS, adapted

METHODS = ("loreft", "lora", "prefix")


def answers(adapter, new_tokens=8, prompts=CAPITALS, total=None, task=None, **changes):
    """What ``adapter``, a pair of settings and model, says to the prompts."""
    config, loaded = adapter
    if task is None:
        task = Task()
        task.decoding = Decoding(99, total)
    config = config.replace(**{"max_new_tokens": new_tokens, "eval_batch_size": 4, **changes})
    encoder = Encoder(task, loaded.tokenizer, loaded.kind, config.max_length)
    return generate(loaded.model, encoder, prompts, config, progress=False)


def alone(loaded, prompt, new_tokens):
    """What a loop of argmax over whole sequences says, without padding and without a cache."""
    ids = torch.tensor([loaded.tokenizer(prompt).input_ids])
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


def seen_by_generate(adapter, monkeypatch, **arguments):
    """The width of the prompts, and the generation config, that the model's ``generate`` gets."""
    seen, model = [], adapter[1].model
    whole = model.generate

    def watched(**inputs):
        seen.append((inputs["input_ids"].shape[1], model.get_base_model().generation_config))
        return whole(**inputs)

    monkeypatch.setattr(model, "generate", watched)
    answers(adapter, **arguments)
    return seen[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_size", [2, 7])
def test_greedy_answers_do_not_depend_on_the_batch(method, batch_size, tiny_llama):
    adapter = adapted(tiny_llama, method=method)
    assert answers(adapter, eval_batch_size=batch_size) == [
        answers(adapter, prompts=[prompt])[0] for prompt in CAPITALS
    ]


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_changes_the_answers(method, tiny_llama):
    adapter = adapted(tiny_llama, method=method)
    changed = answers(adapter)
    with adapter[1].model.disable_adapter():
        assert answers(adapter) != changed


def test_greedy_answers_are_those_of_argmax(loreft):
    assert answers(loreft) == [alone(loreft[1], prompt, 8) for prompt in CAPITALS]


def test_an_encoder_decoder_answers_alike_in_every_batch(tiny_t5):
    adapter = adapted(tiny_t5)
    assert answers(adapter, eval_batch_size=7) == [
        answers(adapter, prompts=[prompt])[0] for prompt in CAPITALS
    ]


def test_an_encoder_decoder_answers_with_no_start_token_and_as_many_tokens_as_asked(tiny_t5):
    adapter = _, loaded = adapted(tiny_t5)
    base = loaded.model.get_base_model()
    inputs = torch.tensor([loaded.tokenizer(CAPITALS[0]).input_ids])
    loaded.model.get_base_model().generation_config.eos_token_id = None
    loaded.tokenizer.eos_token = "[never]"
    ids = torch.tensor([[base.config.decoder_start_token_id]])
    loaded.model.eval()
    with torch.no_grad():
        for _ in range(5):
            logits = loaded.model(input_ids=inputs, decoder_input_ids=ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    expected = loaded.tokenizer.decode(ids[0, 1:], skip_special_tokens=True)
    assert answers(adapter, 5, CAPITALS[:1]) == [expected]


def test_an_answer_ends_at_the_end_token(loreft):
    _, loaded = loreft
    ids = torch.tensor([loaded.tokenizer(CAPITALS[0]).input_ids])
    loaded.model.eval()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    output = loaded.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    whole = output[0, ids.shape[1] :].tolist()
    loaded.tokenizer.eos_token = loaded.tokenizer.convert_ids_to_tokens(whole[3])
    expected = loaded.tokenizer.decode(whole[: whole.index(whole[3])], skip_special_tokens=True)
    assert answers(loreft, prompts=CAPITALS[:1]) == [expected]


def test_the_models_own_decoding_habits_are_left_out_and_come_back(loreft):
    _, loaded = loreft
    expected = answers(loreft)
    habits = loaded.model.get_base_model().generation_config
    habits.repetition_penalty, habits.do_sample, habits.temperature, habits.max_new_tokens = (
        5.0,
        True,
        9.0,
        1,
    )
    assert answers(loreft) == expected
    assert (
        loaded.model.get_base_model().generation_config is habits
        and habits.repetition_penalty == 5.0
    )


def test_drawn_answers_repeat_with_the_seed_and_leave_the_generator_alone(loreft):
    before = torch.get_rng_state()
    drawn = [answers(loreft, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tiny_nucleus_draws_the_likeliest_token(loreft):
    assert answers(loreft, temperature=1.0, top_p=1e-6) == answers(loreft)


def test_beams_do_not_depend_on_the_batch(loreft):
    assert answers(loreft, 6, eval_batch_size=7, num_beams=3) == [
        answers(loreft, 6, [prompt], num_beams=3)[0] for prompt in CAPITALS
    ]


def test_every_module_gets_its_own_mode_back(loreft):
    _, loaded = loreft
    loaded.model.train()
    frozen = loaded.model.get_base_model().model.layers[0]
    frozen.eval()
    before = [module.training for module in loaded.model.modules()]
    answers(loreft, 1)
    assert (
        [module.training for module in loaded.model.modules()] == before
        and True in before
        and False in before
    )


def test_a_limit_of_prompt_and_answer_cuts_each_answer_to_its_own_room(loreft):
    limit = 12  # at most half of it is the answer's where a prompt is long
    lengths = [min(6, len(loreft[1].tokenizer(prompt).input_ids)) for prompt in CAPITALS]
    rooms = [min(8, limit - length) for length in lengths]
    assert {6, 8} <= set(rooms)
    assert answers(loreft, 8, total=limit, eval_batch_size=7) == [
        answers(loreft, room, [prompt], total=limit)[0]
        for prompt, room in zip(CAPITALS, rooms, strict=True)
    ]


def test_settings_win_over_the_tasks_decoding(loreft, monkeypatch):
    changes = {"temperature": 0.5, "top_p": 0.9, "num_beams": 2}
    _, given = seen_by_generate(loreft, monkeypatch, new_tokens=7, total=400, **changes)
    assert (given.max_new_tokens, given.do_sample) == (7, True)
    assert (given.temperature, given.top_p, given.top_k, given.num_beams) == (0.5, 0.9, 0, 2)


def test_a_task_says_what_settings_do_not(loreft, monkeypatch):
    _, given = seen_by_generate(
        loreft, monkeypatch, new_tokens=None, task=tasks.get("boolq"), prompts=["a"]
    )
    assert (given.max_new_tokens, given.do_sample, given.num_beams) == (32, False, 1)


@pytest.mark.parametrize(
    ("limit", "prompt", "answer"),
    [(None, 96, 10), (1000, 96, 10), (100, 90, 10), (12, 6, 6)],
    ids=["none", "wide", "narrow", "tiny"],
)
def test_a_prompt_leaves_room_for_its_answer(limit, prompt, answer, loreft, monkeypatch):
    width, given = seen_by_generate(
        loreft, monkeypatch, new_tokens=10, prompts=["word " * 300], total=limit
    )
    assert (width, given.max_new_tokens) == (prompt, answer)


def test_a_trained_prefix_takes_its_part_of_the_window(tiny_llama):
    assert context_window(adapted(tiny_llama)[1].model, "causal") == 512
    assert (
        context_window(adapted(tiny_llama, method="prefix", prefix_tokens=20)[1].model, "causal")
        == 492
    )
