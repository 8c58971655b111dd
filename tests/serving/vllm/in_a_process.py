"""A program of the tests: an engine in processes of its own, by the arguments of the test.

It prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    from vllm import LLM, SamplingParams

    from reft_kernels.serving.vllm import engine_arguments
    from tests.serving.vllm.engines import engine_options

    told = json.loads(sys.argv[1])
    first = dict(list(told["adapters"].items())[:1])
    llm = LLM(
        model=told["model"],
        **engine_options(**told["options"]),
        **engine_arguments(first, slots=4, max_rank=8),
    )
    for name, folder in list(told["adapters"].items())[1:]:
        llm.collective_rpc("reft_load_adapter", args=(name, folder))

    def run(requests: list[list]) -> list:
        params = [
            SamplingParams(
                temperature=0.0, max_tokens=told["count"], ignore_eos=True, detokenize=False,
                extra_args=None if adapter is None else {"reft": adapter},
            )
            for _, adapter in requests
        ]  # fmt: skip
        prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        return [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]

    tokens = [list(o.token_ids) for _ in range(2) for o in run(told["requests"])]
    bad, base = run([[told["requests"][0][0], "unknown"], [told["requests"][0][0], None]])
    failures = []
    for arguments in ((told["requests"][-1][1], "/nothing"), ("new", "/nothing")):
        try:
            llm.collective_rpc("reft_load_adapter", args=arguments)
        except Exception as error:
            failures.append(str(error))
    llm.collective_rpc("reft_unload_adapter", args=(list(told["adapters"])[-1],))
    listed = llm.collective_rpc("reft_list_adapters")
    result = {
        "tokens": tokens,
        "bad": [bad.finish_reason, bad.stop_reason, list(bad.token_ids)],
        "base": list(base.token_ids),
        "failures": failures,
        "listed": [[adapter["name"] for adapter in rank] for rank in listed],
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
