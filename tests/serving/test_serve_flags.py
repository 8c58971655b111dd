"""Wrong flags of reft-serve end it with status 2 and the reason, before vLLM starts."""

from __future__ import annotations

import json

import pytest


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with a good adapter, one of a high rank, one each of
    another width and another base model, and a damaged one."""
    from tests.serving.vllm.http_models import save_adapter, save_model

    folder = tmp_path_factory.mktemp("flags")
    model = save_model(folder / "model")
    save_adapter(model, folder / "good", 0)
    save_adapter(model, folder / "high", 0, rank=32)
    save_adapter(save_model(folder / "wide-model", hidden_size=128), folder / "wide", 0)
    save_adapter(save_model(folder / "heads-model", num_key_value_heads=2), folder / "heads", 0)
    save_adapter(model, folder / "damaged", 0)
    (folder / "damaged" / "adapter_model.safetensors").write_bytes(b"no tensors")
    return folder


WRONG = {
    "no folder": (["--adapter", "a={base}/absent"], "expected a folder that exists"),
    "no name": (["--adapter", "{base}/good"], "expected NAME=FOLDER"),
    "no value": (["--adapter", "a="], "expected NAME=FOLDER"),
    "bad name": (["--adapter", "a/b={base}/good"], "name: got 'a/b'"),
    "name twice": (["--adapter", "a={base}/good", "--adapter", "a={base}/good"], "'a' twice"),
    "the model's name": (
        ["--served-model-name", "m", "--adapter", "m={base}/good"],
        "which the base model",
    ),
    "damaged": (["--adapter", "a={base}/damaged"], "--adapter a: "),
    "rank": (["--adapter", "a={base}/high", "--max-rank", "16"], "rank: got 32"),
    "width": (["--adapter", "a={base}/wide"], "hidden size 128"),
    "base model": (["--adapter", "a={base}/heads"], "a model with num_key_value_heads 2"),
    "slots": (["--slots", "0"], "slots: got 0"),
    "max rank": (["--max-rank", "0"], "max_rank: got 0"),
    "root": (["--adapter-root", "{base}/absent"], "--adapter-root: got"),
    "worker": (["--worker-cls", "x.Y"], "--worker-cls"),
    "scheduler": (["--scheduler_cls=x.Y"], "--scheduler_cls"),
    "configuration": (["--additional-config", "["], "--additional-config: got '['"),
    "our key": (["--additional-config", '{{"reft": {{}}}}'], "--additional-config: got"),
    "model": (["--model", "{base}/good", "--adapter", "a={base}/good"], "--model: got"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_flags(base, case, capsys, monkeypatch):
    from reft_kernels.serving.vllm import serve

    def never(*_):
        raise AssertionError("vLLM was started")

    monkeypatch.setattr(serve.os, "execv", never)
    flags, reason = WRONG[case]
    flags = [flag.format(base=base) for flag in flags]
    with pytest.raises(SystemExit) as stopped:
        serve.main(["--model", str(base / "model"), *flags])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("reft-serve: ") and error.count("\n") == 1 and reason in error


def test_the_command_that_starts_vllm(base, monkeypatch):
    from reft_kernels.serving.vllm import serve

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    flags = ["--adapter", f"a={base}/good", "--adapter-root", str(base), "--slots", "5"]
    ours = ["--model", str(base / "model"), "--additional-config", '{"other": 1}']
    command, variables = serve.prepared([*ours, *flags, "--max-model-len", "64", "--port=1"])
    assert command[1:5] == [
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(base / "model"),
    ]
    assert command[-3:] == ["--max-model-len", "64", "--port=1"]
    config = json.loads(command[command.index("--additional-config") + 1])
    assert (
        config["other"] == 1 and config["reft"]["slots"] == 5 and config["reft"]["max_rank"] == 16
    )
    assert not config["reft"]["adapters"]  # other adapters must not make vLLM compile anew
    settings = json.loads(variables["REFT_KERNELS_SERVE"])
    assert settings == {"adapters": {"a": str(base / "good")}, "adapter_root": str(base)}
    plugins = variables["VLLM_PLUGINS"].split(",")
    assert {"reft_kernels", "reft_kernels_http"} <= set(plugins)
    command, _ = serve.prepared(["--model", str(base / "model"), "--adapter", f"a={base}/good"])
    config = json.loads(command[command.index("--additional-config") + 1])
    assert config["reft"]["max_rank"] == 4  # nothing larger can come


def test_plugins_that_the_user_names_stay():
    from reft_kernels.serving.vllm.serve import plugins

    assert plugins({"VLLM_PLUGINS": "mine"}) == "mine,reft_kernels,reft_kernels_http"
    assert plugins({"VLLM_PLUGINS": ""}) == "reft_kernels,reft_kernels_http"
