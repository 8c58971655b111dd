"""Chunked prefill with few tokens a step, and preemption in a cache that is too small."""

from __future__ import annotations

import pytest

from tests.serving.vllm import models

BUDGET = 16  # tokens a step


@pytest.fixture(scope="module")
def served(serve):
    # ten blocks of 32 tokens for requests of up to 110
    return serve("llama", max_num_batched_tokens=BUDGET, max_num_seqs=8, num_gpu_blocks_override=10)


def test_prompts_in_chunks(served):
    """Trap 4: a chunk of one token is prefill, and a chunk may hold the prompt's last token."""
    requests = [(p, a) for p in models.prompts((17, 33, 47)) for a in (None, *served.names)]
    served.check(requests, 6)


def test_preempted_requests_do_not_edit_their_replies(served, monkeypatch):
    """Requests that come back compute prompt and reply again, the reply unedited but for "all"."""
    counts = []
    original = type(served.scheduler)._preempt_request

    def counted(self, request, *args, **kwargs):
        counts.append(request.num_output_tokens)
        return original(self, request, *args, **kwargs)

    monkeypatch.setattr(type(served.scheduler), "_preempt_request", counted)
    prompts = models.prompts((40, 41, 42, 43), seed=21)
    for names in (served.names[:4], served.names[4:]):
        served.check(list(zip(prompts, names, strict=True)), 60)
    assert max(counts) > 5  # some came back with a reply
