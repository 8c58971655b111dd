"""Bad input over HTTP: a 4xx with the reason, after which the engine serves as before."""

from __future__ import annotations

import json
import shutil

import pytest

PROMPT = "Name a fruit."


def _refused(site, call, status, reason):
    """Check the status and reason of a call's error, and that a good request still succeeds."""
    import openai

    with pytest.raises(openai.APIStatusError) as caught:
        call()
    assert caught.value.status_code == status, caught.value
    assert reason in str(caught.value)
    site.still_serves()


def _complete(site, **options):
    return site.client.completions.create(
        **{"model": site.base, "prompt": PROMPT, "max_tokens": 4} | options
    )


REQUESTS = {
    "unknown model": ({"model": "absent"}, 404, "The model `absent` does not exist"),
    "unknown name": ("absent", 404, "The ReFT adapter `absent` does not exist"),
    "version of a name": ("a@1", 404, "The ReFT adapter `a@1` does not exist"),
    "a number": (3, 400, "expected the name of an adapter"),
    "a list": (["a"], 400, "expected the name of an adapter"),
    "empty": ("", 400, "expected the name of an adapter"),
    "no JSON": ('{"adapter": ', 400, "no JSON object"),
    "no name": ('{"coefficient": 1}', 400, "adapter: got"),
    "unknown field": ('{"adapter": "a", "strength": 1}', 400, "unknown fields ['strength']"),
    "coefficient": ('{"adapter": "a", "coefficient": "2"}', 400, "coefficient: got"),
    "coefficient NaN": ('{"adapter": "a", "coefficient": NaN}', 400, "coefficient: got"),
    "coefficient infinite": ('{"adapter": "a", "coefficient": 1e999}', 400, "coefficient: got"),
    "subspaces": ('{"adapter": "a", "subspaces": "0"}', 400, "subspaces: got"),
    "subspaces twice": ('{"adapter": "a", "subspaces": [0, 0]}', 400, "subspaces: got"),
    "subspaces above rank": ('{"adapter": "a", "subspaces": [4]}', 400, "below 4, the rank of 'a'"),
    "subspaces negative": ('{"adapter": "a", "subspaces": [-1]}', 400, "subspaces: got"),
    "prompt_length": ('{"adapter": "a", "prompt_length": 0}', 400, "prompt_length: got"),
    "prompt_length long": ('{"adapter": "a", "prompt_length": 999}', 400, "prompt_length: got 999"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", REQUESTS)
def test_requests(site, case, stream):
    given, status, reason = REQUESTS[case]
    options = given if isinstance(given, dict) else {"extra_body": {"vllm_xargs": {"reft": given}}}
    _refused(site, lambda: _complete(site, stream=stream, **options), status, reason)


def test_chat_requests(site):
    def chat(given, **options):
        return site.client.chat.completions.create(
            model=site.base,
            messages=[{"role": "user", "content": PROMPT}],
            extra_body={"vllm_xargs": {"reft": given}},
            **options,
        )

    for stream in (False, True):
        _refused(site, lambda: chat("absent", stream=stream), 404, "does not exist")  # noqa: B023
    _refused(site, lambda: chat('{"adapter": "a", "coefficient": []}'), 400, "coefficient: got")


def test_two_adapters(site):
    extra = {"vllm_xargs": {"reft": "b"}}
    _refused(
        site, lambda: _complete(site, model="a", extra_body=extra), 400, "got 'b' and the model"
    )


def test_an_adapter_outside_vllm_xargs(site):
    _refused(site, lambda: _complete(site, extra_body={"reft": "a"}), 400, "beside vllm_xargs")


def test_beam_search(site):
    beams = {"use_beam_search": True}
    _refused(site, lambda: _complete(site, model="a", n=2, extra_body=beams), 400, "beam search")
    extra = beams | {"vllm_xargs": {"reft": "a"}}
    _refused(site, lambda: _complete(site, n=2, extra_body=extra), 400, "beam search")


def test_one_bad_prompt_of_several_releases_the_adapter(site):
    too_long = [PROMPT, "apple " * 600]
    _refused(site, lambda: _complete(site, model="a", prompt=too_long), 400, "")
    site.wait_until(lambda: site.requests_of("a") == 0)


@pytest.mark.parametrize(
    "path", ["../model", "..", "/etc", "a/../a", "a/", "absent", "outward", "", "a\0b"]
)
def test_paths(site, path):
    outward = site.root / "outward"
    if not outward.is_symlink():
        outward.symlink_to(site.model)
    status = 404 if path == "absent" else 400
    _refused(site, lambda: site.post("/reft/load", name="bad", path=path), status, "path: got")


@pytest.mark.parametrize("name", ["base", "", "a/b", "../a", "a@2", "text", "x" * 200])
def test_names(site, name):
    load = lambda: site.post("/reft/load", name=name, path="a")  # noqa: E731
    _refused(site, load, 400, "name: got")


def test_bodies(site):
    _refused(site, lambda: site.post("/reft/load"), 400, "name")
    _refused(site, lambda: site.post("/reft/load", name="x", folder="a"), 400, "folder")
    _refused(site, lambda: site.post("/reft/unload", name="absent"), 404, "no adapter has it")


OTHER_MODELS = {
    "width": {"hidden_size": 128},
    "layers": {"layers": 6},
    "base model's heads": {"num_key_value_heads": 2},
    "base model's vocabulary": {"vocab_size": 999},
}


def _damaged(site, damage):
    from tests.serving.vllm.http_models import save_adapter, save_model

    folder = site.root / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    if damage in OTHER_MODELS:
        model = save_model(site.root.parent / damage.replace(" ", "-"), **OTHER_MODELS[damage])
        save_adapter(model, folder, 0)
        return
    options = {"rank": 16} if damage == "rank" else {}
    save_adapter(site.model, folder, 0, **options)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    settings = json.loads(config.read_text())
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "garbage":
        weights.write_bytes(b"no tensors")
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no configuration":
        config.unlink()
    elif damage == "no JSON":
        config.write_text("{")
    elif damage == "positions":
        config.write_text(json.dumps(settings | {"positions": "m3"}))
    elif damage == "fingerprint":
        config.write_text(json.dumps(settings | {"base_fingerprint": "a hash"}))
    elif damage == "method":
        config.write_text(json.dumps(settings | {"peft_type": "LORA"}))


DAMAGES = {
    "truncated": "",
    "garbage": "",
    "no weights": "",
    "no configuration": "",
    "no JSON": "",
    "positions": "positions: got 'm3'",
    "method": "",
    "rank": "rank: got 16",
    "width": "hidden size 128",
    "layers": "layers: got",
    "base model's heads": "base model: got an adapter of a model with num_key_value_heads 2",
    "base model's vocabulary": "base model: got an adapter of a model with vocab_size 999",
    "fingerprint": "base_fingerprint: got 'a hash'",
}


def test_a_folder_that_names_no_base_model_is_served_with_a_note(site):
    """As those of earlier releases and of other libraries: the sizes alone are checked."""
    from tests.serving.vllm.http_models import save_adapter

    folder = save_adapter(site.model, site.root / "earlier", 0)
    config = folder / "adapter_config.json"
    settings = json.loads(config.read_text())
    assert settings.pop("base_fingerprint")
    config.write_text(json.dumps(settings))
    assert site.post("/reft/load", name="earlier")["base_fingerprint"] is None
    want = site.tokens(PROMPT, "earlier", 8)
    assert site.complete(PROMPT, "earlier", 8) == [want]
    site.post("/reft/unload", name="earlier")
    assert "earlier does not say which base model" in site.server.log


@pytest.mark.parametrize("damage", DAMAGES)
def test_folders_that_cannot_be_served(site, damage):
    _damaged(site, damage)
    load = lambda name: lambda: site.post("/reft/load", name=name, path="damaged")  # noqa: E731
    _refused(site, load("damaged"), 400, DAMAGES[damage])
    _refused(site, load("a"), 400, DAMAGES[damage])  # "a" is as it was
    assert "damaged" not in {one["name"] for one in site.adapters()}
