"""Folders of PEFT, pyreft and AdapterHub as served adapters; what is refused, and why."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

from reft_kernels import base_model
from reft_kernels.serving.adapters import Form, ServedModel, check_fits, load_adapter, served_model
from reft_kernels.serving.errors import AdapterError
from tests.conversion.folders import RANK, hub_folder, peft_folder, pyreft_model
from tests.model.families import LAYERS, WIDTH, make

METHODS = ("loreft", "direft", "noreft", "nodireft", "consreft", "lobireft")


def _edit(adapter, index: int, weight_set: int, hidden: torch.Tensor) -> torch.Tensor:
    """The formula of the module documentation in fp64."""
    read, bias, write = (
        t[weight_set, index].double() for t in (adapter.read, adapter.read_bias, adapter.write)
    )
    z = hidden.double() @ read.T + bias
    update = z if adapter.form.activation == "linear" else torch.tanh(z)
    if adapter.form.subtract_projection:
        update = update - hidden.double() @ write.T
    return hidden.double() + update @ write


@pytest.mark.parametrize("activation", ("linear", "tanh"))
@pytest.mark.parametrize("method", METHODS)
def test_the_served_form_is_the_methods_edit(tmp_path, method, activation):
    model = peft_folder(
        tmp_path, intervention=method, activation=activation, share_weights=False, layers=[0, 2]
    )
    served = load_adapter(tmp_path)
    assert served.layers == (0, 2) and served.num_sets == 2 and served.untied
    own = activation == "tanh" and method in METHODS[:4]
    assert served.form == (Form("tanh", method in ("loreft", "noreft")) if own else Form())
    (stack,) = (m for n, m in model.named_modules() if n.endswith("reft_stack.default"))
    hidden = torch.randn(5, WIDTH)
    for index, weights in enumerate(stack.build()):
        for number in (0, 1):
            ids = torch.full((5,), number, dtype=torch.int32)
            expected = stack.edit(hidden, weights, weight_ids=ids).double()
            got = _edit(served, index, number, hidden)
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_a_folder_of_pyreft_needs_positions(tmp_path):
    pytest.importorskip("pyreft", reason="needs pyreft")
    reft, interventions = pyreft_model()
    reft.save(str(tmp_path / "a"))
    with pytest.raises(AdapterError, match="positions: got none"):
        load_adapter(tmp_path / "a")
    served = load_adapter(tmp_path / "a", "f2+l2")
    assert served.layers == (0, 2) and served.positions == "f2+l2"
    rotation = interventions[0].rotate_layer.weight.T
    torch.testing.assert_close(served.write[0, 0], rotation.detach(), rtol=0, atol=1e-6)


def test_a_folder_of_adapterhub(tmp_path):
    held = hub_folder(tmp_path / "a", tied=False, subtract_projection=True)
    served = load_adapter(tmp_path / "a")
    assert served.positions == "f3+l2" and served.untied and served.layers == (0, 2)
    expected = held["2.1.read"] - held["2.1.write"]
    torch.testing.assert_close(served.read[1, 1], expected, rtol=0, atol=1e-6)


def test_the_hash_is_that_of_the_content(tmp_path):
    peft_folder(tmp_path / "a", response_template=[[3, 4]])
    first = load_adapter(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert load_adapter(tmp_path / "b").hash == first.hash
    assert first.template == ((3, 4),)
    hashes = {first.hash, load_adapter(tmp_path / "b", "f3+l3").hash}
    config = tmp_path / "b" / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "response_template": [[3, 5]]}))
    hashes.add(load_adapter(tmp_path / "b").hash)
    config.write_text(json.dumps({**content, "pyreft_positions": True}))
    hashes.add(load_adapter(tmp_path / "b").hash)
    model = PeftModel.from_pretrained(make("llama"), tmp_path / "b")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith(".b")).add_(1e-3)
    model.save_pretrained(tmp_path / "c")
    hashes.add(load_adapter(tmp_path / "c").hash)
    assert len(hashes) == 5


def test_the_description_is_json(tmp_path):
    peft_folder(tmp_path)
    told = json.loads(json.dumps(load_adapter(tmp_path).describe()))
    assert told["rank"] == RANK and told["layers"] == list(range(LAYERS))
    assert told["positions"] == "f3+l2" and told["intervention"] == "loreft"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"intervention": "red"}, "intervention: got 'red'"),
        ({"positions": "text:l2", "share_weights": True}, "positions: got 'text:l2'"),
        ({"component": "mlp_output"}, "component: got 'mlp_output', expected 'block_output'"),
    ],
)
def test_what_is_not_served_is_refused_by_name(tmp_path, config, message):
    peft_folder(tmp_path, **config)
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path)


def test_corrupt_folders(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        load_adapter(tmp_path / "none")
    with pytest.raises(ValueError, match="no known format"):
        load_adapter(tmp_path)
    peft_folder(tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be loaded as safetensors"):
        load_adapter(tmp_path / "a")
    weights.write_bytes(content)
    config = tmp_path / "a" / "adapter_config.json"
    text = config.read_text()
    config.write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        load_adapter(tmp_path / "a")
    config.write_text(text.replace('"save_id": "', '"save_id": "0'))
    with pytest.raises(AdapterError, match="a save was interrupted"):
        load_adapter(tmp_path / "a")
    config.write_text(json.dumps({**json.loads(text), "layers": [0]}))
    with pytest.raises(ValueError, match="layers: got \\[0\\]"):
        load_adapter(tmp_path / "a")
    model = peft_folder(tmp_path / "b")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith(".b")).fill_(float("nan"))
    model.save_pretrained(tmp_path / "b")
    with pytest.raises(AdapterError, match="not finite"):
        load_adapter(tmp_path / "b")


def test_an_adapter_must_fit_the_model(tmp_path):
    peft_folder(tmp_path / "a")
    served = load_adapter(tmp_path / "a")
    check_fits(served, ServedModel(WIDTH, LAYERS), RANK)
    for (width, layers, rank), message in (
        ((WIDTH + 1, LAYERS, RANK), "width: got an adapter of hidden size"),
        ((WIDTH, LAYERS - 1, RANK), "expected numbers below"),
        ((WIDTH, LAYERS + 1, RANK), "got 'all' of a model with"),
        ((WIDTH, LAYERS, RANK - 1), "expected at most max_rank=3"),
    ):
        with pytest.raises(AdapterError, match=message):
            check_fits(served, ServedModel(width, layers), rank)


def test_an_adapter_must_be_of_the_model(tmp_path):
    peft_folder(tmp_path / "a")
    served = load_adapter(tmp_path / "a")
    own = base_model.of_model(make("llama"))
    assert served.fingerprint == own and served.describe()["base_fingerprint"] == own.hash
    check_fits(served, ServedModel(WIDTH, LAYERS, own), RANK)
    other = own._replace(config=own.config | {"model_type": "mistral"})
    with pytest.raises(AdapterError, match="model_type llama, expected model_type mistral"):
        check_fits(served, ServedModel(WIDTH, LAYERS, other), RANK)
    config = tmp_path / "a" / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({n: v for n, v in settings.items() if n != "base_fingerprint"}))
    earlier = load_adapter(tmp_path / "a")
    assert earlier.fingerprint is None and earlier.hash == served.hash
    check_fits(earlier, ServedModel(WIDTH, LAYERS, other), RANK)
    config.write_text(json.dumps(settings | {"base_fingerprint": 3}))
    with pytest.raises(AdapterError, match="a: base_fingerprint: got '3'"):
        load_adapter(tmp_path / "a")


def test_the_served_model_is_read_from_its_folder(tmp_path):
    model = make("llama")
    model.save_pretrained(tmp_path)
    found = served_model(model.config, tmp_path)
    assert found == (WIDTH, LAYERS, base_model.of_model(model))
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(AdapterError, match="model: .*model.safetensors: cannot be read"):
        served_model(model.config, tmp_path)


def test_settings_of_an_engine_are_checked():
    from reft_kernels.serving.vllm import engine_arguments, settings

    told = engine_arguments({"a": "/a", "b": {"folder": "/b", "positions": "f1"}}, slots=2)
    parsed = settings.parse(told["additional_config"]["reft"])
    assert parsed.slots == 2 and parsed.max_rank == 16
    assert parsed.adapters["a"] == ("/a", None) and parsed.adapters["b"] == ("/b", "f1")
    json.dumps(told)
    for wrong in ({"slots": 0}, {"max_rank": 257}, {"slots": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            engine_arguments(**wrong)
    for adapters in (
        {"a": 3},
        {"": "/a"},
        {"a": {"positions": "f1"}},
        {"a": {"folder": "", "x": 1}},
    ):
        with pytest.raises(AdapterError, match="adapters: got"):
            engine_arguments(adapters)
    with pytest.raises(AdapterError, match="unknown settings \\['slot'\\]"):
        settings.parse({"slot": 1})
