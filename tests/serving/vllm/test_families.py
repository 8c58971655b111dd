"""Token for token as transformers and PEFT: several architectures, 1 to 8 adapters in a batch."""

from __future__ import annotations

import pytest

from tests.serving.vllm import models

LENGTHS = (3, 18, 45, 70)


# the mixture of experts first: vLLM makes its process groups with the first engine of a process
@pytest.fixture(scope="module", params=("mixtral", "qwen3", "gemma3"))
def served(request, serve):
    # 64 tokens a step: prompts of 70 tokens are computed in chunks
    return serve(request.param, max_num_batched_tokens=64, max_num_seqs=16)


def test_all_adapters_and_the_base_model_in_one_batch(served):
    requests = [(p, a) for p in models.prompts(LENGTHS) for a in (None, *served.names)]
    served.check(requests)
    served.check(requests[::-1])  # from the cache
    edited = [served.expected(p, a) != served.expected(p, None) for p, a in requests if a]
    assert sum(edited) > len(edited) * 0.75  # the adapters do change the text


def test_each_adapter_alone(served):
    served.forget_cache()
    (prompt,) = models.prompts((40,), seed=5)
    for name in (None, *served.names):
        served.check([(prompt, name)])
