"""Requests of one engine: prefix cache, settings of a request, errors, control, abortion."""

from __future__ import annotations

import pytest

from tests.serving.vllm import models
from tests.serving.vllm.engines import BLOCK


@pytest.fixture(scope="module")
def served(serve):
    return serve("llama")


@pytest.fixture(autouse=True)
def _cold(served):
    served.forget_cache()


# ---- the prefix cache


def _cached(outputs) -> list[int]:
    return [o.num_cached_tokens for o in outputs]


def test_one_to_eight_adapters_in_a_batch(served):
    prompts = models.prompts((3, 33, 64, 70, 130))
    for count in (1, 2, 5, 8):
        served.check([(p, a) for p in prompts for a in (None, *served.names[:count])])


@pytest.mark.parametrize("first", (None, "ends", "prompt"))
def test_states_are_shared_with_the_same_adapter_only(served, first):
    """Traps 1 and 2: an adapter after the base model, the base model after an adapter."""
    (prompt,) = models.prompts((100,), seed=3)
    served.check([(prompt, first)])
    for name in (None, *served.names):
        if name != first:
            outputs = served.outputs([(prompt, name)], 12)
            assert list(outputs[0].outputs[0].token_ids) == served.expected(prompt, name)
            assert _cached(outputs) == [0], name
    again = served.outputs([(prompt, first)], 12)
    assert _cached(again) == [3 * BLOCK]
    assert list(again[0].outputs[0].token_ids) == served.expected(prompt, first)


@pytest.mark.parametrize(("name", "shared"), [("first", 1), ("everything", 1), ("last", 0)])
def test_prompts_of_other_lengths(served, name, shared):
    """Trap 3: positions from the prompt's end; prefixes and "all" share their blocks."""
    (prompt,) = models.prompts((100,), seed=4)
    served.check([(prompt, name)])
    for length in (70, 99, 96):
        outputs = served.outputs([(prompt[:length], name)])
        assert list(outputs[0].outputs[0].token_ids) == served.expected(prompt[:length], name)
        # at least the last token is always computed
        assert _cached(outputs) == [shared * ((length - 1) // BLOCK * BLOCK)], length


@pytest.mark.parametrize("name", ("prompt", "ends", "everything", None))
def test_a_second_turn_reuses_no_reply_as_prompt(served, name):
    """Trap 3: the reply's blocks are unedited, and a prompt's must be edited."""
    (prompt,) = models.prompts((60,), seed=6)
    reply = served.tokens([(prompt, name)], 40)[0]
    assert reply == served.expected(prompt, name, 40)
    served.check([(prompt + reply + [1, 2, 3], name)])


def test_the_oracle_sees_a_missing_salt(served, monkeypatch):
    """Without the salt, a request with an adapter reads the base model's states."""
    from reft_kernels.serving.vllm import scheduler

    (prompt,) = models.prompts((100,), seed=7)
    monkeypatch.setattr(scheduler, "cache_salt", lambda *args, client: client)
    served.check([(prompt, None)])
    assert served.tokens([(prompt, "prompt")])[0] != served.expected(prompt, "prompt")


def test_a_clients_salt_still_separates_clients(served):
    from vllm import SamplingParams

    (prompt,) = models.prompts((70,), seed=8)
    params = SamplingParams(
        temperature=0, max_tokens=4, ignore_eos=True, detokenize=False,
        extra_args={"reft": "ends"},
    )  # fmt: skip
    cached = [
        served.llm.generate(
            {"prompt_token_ids": prompt, "cache_salt": salt}, params, use_tqdm=False
        )[0].num_cached_tokens
        for salt in ("one", "two", "one")
    ]
    assert cached == [0, 0, 64]


# ---- settings of a request


def _scaled(served, name: str, coefficient: float, subspaces=None) -> str:
    """Add an adapter to the PEFT model whose weights have the coefficient in them."""
    import torch

    from reft_kernels.integrations.peft import ReftConfig
    from reft_kernels.integrations.peft.tuner import container_of
    from reft_kernels.serving.adapters import load_adapter

    made = f"{name}-{coefficient}-{subspaces}".replace(".", "_")
    if made in served.peft.peft_config:
        return made
    source, settings = load_adapter(served.paths[name]), models.ADAPTERS[name]
    kept = {k: v for k, v in settings.items() if k in ("positions", "rank", "layers")}
    served.peft.add_adapter(made, ReftConfig(init=None, intervention="nodireft", **kept))
    ((_, stack),) = container_of(served.model).stacks(made).items()
    factors = torch.zeros(source.rank)
    factors[list(range(source.rank) if subspaces is None else subspaces)] = coefficient
    with torch.no_grad():
        stack.W1.copy_(source.read[0])
        stack.b.copy_(source.read_bias[0])
        stack.W2.copy_(source.write[0] * factors[:, None])
    return made


@pytest.mark.parametrize("name", ("ends", "prompt", "everything"))
def test_coefficients_and_subspaces(served, name):
    prompts = models.prompts((20, 70), seed=9)
    cases = [(0.5, None), (-1.5, None), (1.0, [0]), (2.0, [1])]
    requests, wanted = [(p, None) for p in prompts], [served.expected(p, None) for p in prompts]
    for coefficient, subspaces in cases:
        scaled = _scaled(served, name, coefficient, subspaces)
        for prompt in prompts:
            value = {"adapter": name, "coefficient": coefficient}
            requests.append(
                (prompt, value | ({} if subspaces is None else {"subspaces": subspaces}))
            )
            wanted.append(served.expected(prompt, scaled))
    for _ in range(2):  # cold, then from the cache
        assert served.tokens(requests) == wanted
    off = served.tokens([(p, {"adapter": name, "coefficient": 0}) for p in prompts])
    assert off == wanted[:2]


def test_a_prompt_length_of_its_own(served):
    """The first tokens are the prompt, the others a reply that is continued."""
    (prompt,) = models.prompts((50,), seed=10)
    whole = served.expected(prompt, "ends", 30)
    continued = [(prompt + whole[:18], {"adapter": "ends", "prompt_length": 50})]
    assert served.tokens(continued, 12)[0] == whole[18:]


def test_several_samples_of_a_request(served):
    """Samples of the likeliest token alone, which are known: vLLM takes n > 1 only with sampling."""
    (prompt,) = models.prompts((40,), seed=11)
    params = _sampling("ends", n=4, seed=5, temperature=1.0, top_k=1)
    (output,) = served.llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    assert len(output.outputs) == 4
    for sample in output.outputs:
        assert list(sample.token_ids) == served.expected(prompt, "ends", 8)


def _sampling(adapter, **settings):
    from vllm import SamplingParams

    defaults = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, "detokenize": False}
    return SamplingParams(**{**defaults, **settings}, extra_args={"reft": adapter})


# ---- errors


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("unknown", "adapter: got 'unknown', expected one of those loaded"),
        ({"adapter": "ends", "coefficient": "x"}, "coefficient: got str"),
        ({"adapter": "ends", "strength": 1}, "unknown fields"),
    ],
)
def test_a_refused_request_leaves_the_engine_alive(served, value, message):
    (prompt,) = models.prompts((20,), seed=12)
    with pytest.raises(ValueError, match=message):
        served.tokens([(prompt, None), (prompt, value)])
    served.check([(prompt, None), (prompt, "ends")])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"adapter": "ends", "subspaces": [4]}, "expected numbers below 4"),
        ({"adapter": "ends", "prompt_length": 21}, "expected at most 20"),
    ],
)
def test_a_request_that_does_not_fit_finishes_with_an_error(served, value, message):
    """Known only where the adapter is: the engine answers with an error and the reason."""
    (prompt,) = models.prompts((20,), seed=12)
    good, bad = served.outputs([(prompt, "ends"), (prompt, value)])
    assert list(good.outputs[0].token_ids) == served.expected(prompt, "ends")
    assert bad.outputs[0].finish_reason == "error" and not bad.outputs[0].token_ids
    assert message in bad.outputs[0].stop_reason


def test_an_engine_whose_front_does_not_know_names(served, monkeypatch):
    """As for an engine in another process: the scheduler refuses the name."""
    from reft_kernels.serving.vllm import plugin

    (prompt,) = models.prompts((20,), seed=12)
    config = served.llm.llm_engine.vllm_config
    monkeypatch.delattr(config, plugin.REGISTRY)
    base, bad = served.outputs([(prompt, None), (prompt, "unknown")])
    assert list(base.outputs[0].token_ids) == served.expected(prompt, None)
    assert bad.outputs[0].finish_reason == "error" and "unknown" in bad.outputs[0].stop_reason
    served.check([(prompt, "ends")])


# ---- control


def _names(served) -> list[str]:
    return [a["name"] for a in served.llm.collective_rpc("reft_list_adapters")[0]]


def test_loading_and_unloading(served):
    (prompt,) = models.prompts((40,), seed=13)
    path = str(served.paths["ends"])
    (loaded,) = served.llm.collective_rpc("reft_load_adapter", args=("copy", path))
    assert loaded["rank"] == 4 and loaded["layers"] == [0, 1, 2, 3] and loaded["bytes"] > 0
    assert loaded["positions"] == "f2+l2" and loaded["name"] == "copy" and len(loaded["hash"]) == 64
    assert served.tokens([(prompt, "copy")])[0] == served.expected(prompt, "ends")
    assert served.llm.collective_rpc("reft_load_adapter", args=("copy", path))[0] | {
        "resident": False
    } == loaded | {"resident": False}
    served.llm.collective_rpc("reft_unload_adapter", args=("copy",))
    assert "copy" not in _names(served)
    with pytest.raises(ValueError, match="'copy'"):
        served.tokens([(prompt, "copy")])
    served.check([(prompt, "ends")])


@pytest.mark.parametrize("form", ("pyreft", "adapterhub"))
def test_folders_of_other_libraries(served, tmp_path, form):
    """As they are, beside the same folders converted for PEFT, in transformers."""
    from reft_kernels.conversion import exact
    from reft_kernels.conversion.common import Options
    from reft_kernels.convert import convert
    from tests.conversion.folders import hub_folder

    folder, options = tmp_path / form, Options(positions="f2+l3", dtype="float32")
    if form == "pyreft":
        convert(served.paths["ends"], folder, "pyreft", options=options)
        (folder / exact.FILE).unlink()  # pyreft writes none
    else:
        hub_folder(folder, tied=False, layers=(0, 2, 3), width=128)
    positions = options.positions if form == "pyreft" else None  # AdapterHub's has its own
    convert(
        folder,
        tmp_path / "converted",
        "peft",
        options=Options(positions=positions, dtype="float32"),
    )
    served.peft.load_adapter(str(tmp_path / "converted"), form)
    call = served.llm.collective_rpc
    (info,) = call("reft_load_adapter", args=(form, str(folder), positions))
    assert info["base_fingerprint"] is None
    requests = [(p, form) for p in models.prompts((4, 33, 70), seed=18)]
    served.check([*requests, *((p, None) for p, _ in requests)])
    assert all(served.expected(p, form) != served.expected(p, None) for p, _ in requests)
    call("reft_unload_adapter", args=(form,))


def test_an_adapter_of_another_base_model_is_refused(served, tmp_path):
    other = models.make_model("qwen3", tmp_path / "model")
    models.make_adapters(other, tmp_path, {"qwen": models.ADAPTERS["ends"]})
    with pytest.raises(ValueError, match="with model_type qwen3, .*expected model_type llama"):
        served.llm.collective_rpc("reft_load_adapter", args=("qwen", str(tmp_path / "qwen")))
    assert "qwen" not in _names(served)
    served.check([(models.prompts((20,), seed=12)[0], "ends")])


@pytest.mark.parametrize("name", ("ends", "other"))
def test_a_failed_load_changes_nothing(served, tmp_path, name):
    before = served.llm.collective_rpc("reft_list_adapters")
    for folder in (tmp_path, served.folder / "model", served.paths["last"]):
        if name == "other" and folder == served.paths["last"]:
            continue
        with pytest.raises(ValueError):
            served.llm.collective_rpc("reft_load_adapter", args=(name, str(folder)))
    with pytest.raises(ValueError, match="'nothing'"):
        served.llm.collective_rpc("reft_unload_adapter", args=("nothing",))
    after = served.llm.collective_rpc("reft_list_adapters")
    assert [a | {"resident": 0} for a in after[0]] == [a | {"resident": 0} for a in before[0]]
    served.check([(models.prompts((20,), seed=12)[0], "ends")])


def _start(served, requests, count: int) -> list[str]:
    """Queue requests in the engine without running it."""
    ids = []
    for number, (prompt, value) in enumerate(requests):
        params = _sampling(value, max_tokens=count)
        ids.append(
            served.llm.llm_engine.add_request(f"r{number}", {"prompt_token_ids": prompt}, params)
        )
    return ids


def _finish(served) -> dict[str, list[int]]:
    done = {}
    while served.llm.llm_engine.has_unfinished_requests():
        for output in served.llm.llm_engine.step():
            if output.finished:
                done[output.request_id] = list(output.outputs[0].token_ids)
    return done


def test_an_adapter_is_unloaded_while_requests_run(served):
    """Accepted requests finish with it, waiting ones too; the weights are freed after the last."""
    prompts = models.prompts((40,) * 3 + (50,) * 20, seed=14)
    (info,) = served.llm.collective_rpc(
        "reft_load_adapter", args=("passing", str(served.paths["ends"]))
    )
    served.llm.collective_rpc("reft_unload_adapter", args=("ends",))  # one name less
    ids = _start(served, [(p, "passing") for p in prompts], 10)
    for _ in range(3):
        served.llm.llm_engine.step()
    served.llm.collective_rpc("reft_unload_adapter", args=("passing",))
    assert info["hash"] in served.worker.reft.adapters
    with pytest.raises(ValueError, match="passing"):
        _start(served, [(prompts[0], "passing")], 4)
    done = _finish(served)
    for prompt, request in zip(prompts, sorted(done, key=lambda r: int(r[1:])), strict=True):
        assert done[request] == served.expected(prompt, "ends", 10)
    assert len(done) == len(ids)
    served.check([(prompts[0], None)])
    assert info["hash"] not in served.worker.reft.adapters
    served.llm.collective_rpc("reft_load_adapter", args=("ends", str(served.paths["ends"])))
    served.check([(prompts[0], "ends")])


def test_an_abortion_in_the_middle(served):
    prompts = models.prompts((40,) * 6, seed=15)
    _start(served, list(zip(prompts, served.names, strict=False)), 10)
    for _ in range(3):
        served.llm.llm_engine.step()
    served.llm.llm_engine.abort_request(["r0", "r1", "r2"])
    done = _finish(served)
    assert len(done) == 3
    for number in (3, 4, 5):
        assert done[f"r{number}"] == served.expected(prompts[number], served.names[number], 10)
    assert not served.scheduler._edits and not served.scheduler.reft_registry._running
    served.check(list(zip(prompts, served.names, strict=False)))
    served.check([(prompts[0], None)])  # the step that tells the worker what is finished
    assert not served.worker.reft._edits


# ---- steps


def test_a_step_without_edited_rows_calls_no_operator(served, monkeypatch):
    """One prompt step with edits in every layer, then decode steps without a call."""
    import torch

    from reft_kernels.serving.vllm import layers

    calls = []
    original = layers._edit

    def counted(hidden, residual, layer):
        calls.append(layer)
        return original(hidden, residual, layer)

    monkeypatch.setattr(layers, "_edit", counted)
    (prompt,) = models.prompts((20,), seed=16)
    served.check([(prompt, None)])
    assert calls == []
    served.check([(prompt, "ends")], 12)
    assert calls == [0, 1, 2, 3]
    calls.clear()
    served.check([(prompt, "everything")], 5)
    assert calls == [0, 1, 2, 3] * 5
    assert torch.is_tensor(served.worker.reft.bank.write)


def test_a_step_has_one_launch_a_layer(served, monkeypatch):
    """For several adapters of one form; "tanh" has a launch of its own."""
    from reft_kernels.serving.vllm import operator

    launches = []
    original = operator._edit_rows

    def counted(hidden, residual, group, step, layer):
        launches.append(layer)
        return original(hidden, residual, group, step, layer)

    monkeypatch.setattr(operator, "_edit_rows", counted)
    prompts = models.prompts((20, 33), seed=19)
    served.check([(p, a) for p in prompts for a in (None, "ends", "last", "prompt")])
    assert launches == [0, 1, 2, 3]
    launches.clear()
    served.check([(p, a) for p in prompts for a in (None, "ends", "tanh")])
    assert sorted(launches) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_more_adapters_than_slots_wait_for_their_turn(served):
    """8 adapters with 9 weight sets on 4 slots, all at once, twice."""
    prompts = models.prompts((45, 46), seed=17)
    requests = [(p, a) for p in prompts for a in served.names]
    served.check(requests)
    assert len(served.worker.reft.bank.resident) <= 4
    assert not served.scheduler._edits
