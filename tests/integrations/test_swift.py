"""The ms-swift tuner: arguments, interface, plugin file, and prompts under ``logits_to_keep``.

ms-swift requires an older PEFT and many packages, so most tests use its documented interface: an
object with its arguments, and a replacement of its registry. The last tests run with the package if
it is installed.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import reft_kernels
from reft_kernels.integrations import swift as plugin
from reft_kernels.integrations.peft import ReftConfig
from reft_kernels.integrations.swift import NAME, ReftKernelsTuner, reft_config, register
from tests.model.families import LAYERS, batch, hook_count, make, shake, stacks

FILE = Path(plugin.__file__)
ARGUMENTS = {
    "reft_layer_key": None,
    "reft_layers": None,
    "reft_rank": 4,
    "reft_intervention_type": "LoreftIntervention",
    "reft_args": None,
    "modules_to_save": [],
    "task_type": "causal_lm",
}


def arguments(**given) -> types.SimpleNamespace:
    return types.SimpleNamespace(**(ARGUMENTS | given))


def cut_down(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | int]:
    """Return a batch as ms-swift shortens it.

    ``logits_to_keep`` is a mask for one example and a number for several.
    """
    labels = inputs["labels"]
    if labels.shape[0] == 1:
        labelled = (labels != -100)[0]
        labels = nn.functional.pad(labels[:, labelled], (1, 0), value=-100)
        kept = nn.functional.pad(labelled[1:], (0, 1), value=True)
    else:
        kept = labels.shape[-1] - int((labels != -100).int().argmax(-1).min()) + 1
        labels = labels[:, -kept:]
    return {**inputs, "labels": labels, "logits_to_keep": kept}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# arguments


def test_the_defaults_are_swifts_rank_and_the_papers_positions():
    config = reft_config(arguments())
    assert isinstance(config, ReftConfig)
    assert (config.layers, config.rank, config.intervention) == ("all", 4, "loreft")
    assert (config.positions, config.component, config.task_type) == (
        "f7+l7",
        "block_output",
        "CAUSAL_LM",
    )
    assert reft_config(types.SimpleNamespace()).rank == 4


@pytest.mark.parametrize("name", ["Noreft", "Loreft", "Consreft", "Lobireft", "Direft", "Nodireft"])
def test_every_intervention_type_of_swift_trains(name):
    args = arguments(reft_intervention_type=f"{name}Intervention", reft_layers=[0, 2])
    model = ReftKernelsTuner.prepare_model(args, make("llama"))
    (stack,) = stacks(model)
    assert type(stack).__name__.lower() == f"stacked{name.lower()}" and stack.num_layers == 2
    shake(model)  # at the identity start, half of the parameters have no gradient
    model(**batch("llama")).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    assert all("reft_" in n for n in trained)


def test_every_option():
    config = reft_config(
        arguments(
            reft_rank=8,
            reft_layers=[1],
            reft_layer_key="model.layers",
            modules_to_save=["lm_head"],
            task_type="embedding",
            reft_args=(
                '{"positions": "f3+l3", "share_weights": false, "act_fn": "gelu", "dropout": 0.1, '
                '"init": "orthogonal"}'
            ),
        )
    )
    assert (config.rank, config.layers, config.component) == (8, [1], "model.layers.{layer}")
    assert (config.positions, config.share_weights, config.activation) == ("f3+l3", False, "gelu")
    assert (config.dropout, config.init, config.modules_to_save, config.task_type) == (
        0.1,
        "orthogonal",
        ["lm_head"],
        None,
    )
    assert reft_config(arguments(reft_args={"intervention": "red"})).intervention == "red"
    assert reft_config(arguments(task_type="seq_cls")).task_type == "SEQ_CLS"
    assert (
        reft_config(
            arguments(reft_intervention_type="NoreftIntervention", reft_args='{"add_bias": true}')
        ).init
        is None
    )


WRONG = [
    ({"reft_args": "{"}, "reft_args: got '{', expected a JSON object"),
    ({"reft_args": "[1]"}, "reft_args: got"),
    ({"reft_args": '{"alpha": 1}'}, "reft_args: got alpha, expected names among positions"),
    ({"reft_args": '{"act_fn": "gelu", "activation": "gelu"}'}, "got both act_fn and activation"),
    ({"reft_args": '{"positions": "x"}'}, "positions: got 'x'"),
    (
        {"reft_intervention_type": "LoraIntervention"},
        "reft_intervention_type: got 'LoraIntervention', expected one of loreft",
    ),
    (
        {"reft_layer_key": "model.layers", "reft_args": '{"component": "mlp_output"}'},
        "reft_layer_key: got 'model.layers' beside",
    ),
    ({"modules_to_save": ["all-norm"]}, "modules_to_save: got all-norm"),
    ({"reft_rank": 0}, "rank: got 0"),
    ({"reft_layers": [0, 9]}, "layers: got"),
    (
        {
            "reft_intervention_type": "NoreftIntervention",
            "reft_args": '{"add_bias": true, "act_fn": "relu"}',
        },
        "reft_args: got add_bias and act_fn 'relu'",
    ),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=[m for _, m in WRONG])
def test_wrong_arguments_are_named_and_leave_the_model_as_it_was(given, message):
    model = make("llama")
    keys = list(model.state_dict())
    with pytest.raises(ValueError) as caught:
        ReftKernelsTuner.prepare_model(arguments(**given), model)
    assert message in str(caught.value)
    assert list(model.state_dict()) == keys and hook_count(model) == 0


# the interface


@pytest.mark.parametrize("gathered", [False, True])
def test_save_and_resume(tmp_path, gathered):
    model = ReftKernelsTuner.prepare_model(arguments(reft_rank=3), make("llama"))
    shake(model)
    inputs = batch("llama")
    expected = model.eval()(**inputs).logits
    state = {n: p.detach() * 2 for n, p in model.state_dict().items()} if gathered else None
    ReftKernelsTuner.save_pretrained(
        model, str(tmp_path), state_dict=state, safe_serialization=True
    )
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        p.name for p in tmp_path.iterdir()
    }
    served = ReftKernelsTuner.from_pretrained(make("llama"), str(tmp_path)).eval()
    assert torch.equal(served(**inputs).logits, expected) != gathered
    assert not any(p.requires_grad for p in served.parameters())
    resumed = ReftKernelsTuner.from_pretrained(make("llama"), str(tmp_path), is_trainable=True)
    assert trainable(resumed) == trainable(model)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("resumed", [False, True])
def test_prompts_are_found_where_swift_cuts_the_labels(tmp_path, count, resumed):
    model = ReftKernelsTuner.prepare_model(arguments(), make("llama"))
    shake(model)
    if resumed:
        ReftKernelsTuner.save_pretrained(model, str(tmp_path))
        model = ReftKernelsTuner.from_pretrained(make("llama"), str(tmp_path))
    inputs = {name: t[:count] for name, t in batch("llama").items()}
    expected = model(**inputs)
    cut = cut_down(inputs)
    assert cut["labels"].shape != inputs["labels"].shape
    got = model(**cut)
    kept = cut["logits_to_keep"]
    assert torch.equal(got.logits, expected.logits[:, kept if count == 1 else slice(-kept, None)])
    whole = model(**{name: t for name, t in inputs.items() if name != "labels"}).logits
    assert not torch.allclose(whole, expected.logits)


def test_prompts_of_packed_sequences_are_found_too():
    model = ReftKernelsTuner.prepare_model(
        arguments(reft_args='{"positions": "f2+l2"}'), make("llama")
    )
    shake(model)
    one = batch("llama")["input_ids"][:1]
    position_ids = torch.cat([torch.arange(14), torch.arange(10)]).unsqueeze(0)
    labels = one.clone()
    labels[0, :6] = labels[0, 14:19] = -100
    inputs = {"input_ids": one, "position_ids": position_ids, "labels": labels}
    expected = model(**inputs).logits
    cut = cut_down(inputs)
    assert torch.equal(model(**cut).logits, expected[:, cut["logits_to_keep"]])
    lengths = model(**inputs, prompt_lengths=[6, 5]).logits
    assert torch.equal(lengths, expected) and not torch.allclose(
        model(**inputs, prompt_lengths=[14, 10]).logits, expected
    )


def test_a_copy_keeps_its_prompts():
    model = ReftKernelsTuner.prepare_model(arguments(), make("llama"))
    shake(model)
    inputs = batch("llama")
    cut = cut_down(inputs)
    assert torch.equal(copy.deepcopy(model)(**cut).logits, model(**cut).logits)


# registration


def test_registering_and_what_it_refuses(monkeypatch):
    registry = {"ia3": object}
    register(registry)
    register(registry)
    assert registry[NAME] is ReftKernelsTuner
    with pytest.raises(ImportError, match="another tuner called 'reft_kernels'"):
        register({NAME: dict})
    monkeypatch.setattr(plugin, "_find_registry", lambda: None)
    with pytest.raises(ImportError, match="pip install ms-swift"):
        register()


STAND_IN = {4: ("swift.tuner_plugin", "tuners_map"), 3: ("swift.plugin", "extra_tuners")}


def stand_in(monkeypatch, version: int) -> dict:
    """Replace ms-swift's modules by modules that have only its registry."""
    path, name = STAND_IN[version]
    package, module, registry = types.ModuleType("swift"), types.ModuleType(path), {}
    package.__path__ = []
    setattr(module, name, registry)
    monkeypatch.setitem(sys.modules, "swift", package)
    for other, _ in STAND_IN.values():
        # hide the real module, even if it was imported before
        monkeypatch.setitem(sys.modules, other, None)
    monkeypatch.setitem(sys.modules, path, module)
    return registry


@pytest.mark.parametrize("version", STAND_IN)
def test_the_registry_of_each_release_is_found(monkeypatch, version):
    registry = stand_in(monkeypatch, version)
    register()
    assert registry[NAME] is ReftKernelsTuner


def test_a_package_that_swift_lacks_is_not_hidden(monkeypatch):
    def fail(path):
        raise ModuleNotFoundError("No module named 'modelscope'", name="modelscope")

    monkeypatch.setattr(plugin.importlib, "import_module", fail)
    with pytest.raises(ModuleNotFoundError, match="modelscope"):
        register()


def test_as_an_external_plugin_the_file_registers_and_leaves_the_path_alone(monkeypatch):
    registry = stand_in(monkeypatch, 4)
    # ms-swift 4 adds the folder to the path before it runs the file
    monkeypatch.setattr(sys, "path", [str(FILE.parent), *sys.path])
    spec = importlib.util.spec_from_file_location("_swift_external_0", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert registry[NAME] is module.ReftKernelsTuner and str(FILE.parent) not in sys.path
    model = registry[NAME].prepare_model(arguments(), make("llama"))
    assert stacks(model)[0].num_layers == LAYERS


# tests with the package


def _swift_is_installed() -> bool:
    spec = importlib.util.find_spec("swift")
    return spec is not None and any(
        importlib.util.find_spec(path) is not None for path, _ in STAND_IN.values()
    )


needs_swift = pytest.mark.skipif(not _swift_is_installed(), reason="needs the package ms-swift")

RUN = """
import sys
from swift.tuner_plugin import PeftTuner, tuners_map
from swift.utils import import_external_file
import_external_file(sys.argv[1])
tuner = tuners_map["reft_kernels"]
methods = ("prepare_model", "save_pretrained", "from_pretrained")
assert all(isinstance(vars(tuner)[name], staticmethod) for name in methods)
import peft
assert "reft_kernels" not in peft.__file__
print("registered", tuner.__module__)
"""


@needs_swift
def test_swift_imports_the_file_by_external_plugins():
    root = str(Path(reft_kernels.__file__).parents[1])
    code = f"import sys\nsys.path.insert(0, {root!r})\n{RUN}"
    ran = subprocess.run([sys.executable, "-c", code, str(FILE)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "registered _swift_external_" in ran.stdout


@needs_swift
def test_swifts_own_mixin_prepares_and_resumes(tmp_path):
    from swift.pipelines.train.tuner import TunerMixin
    from swift.tuner_plugin import tuners_map

    register()
    args = arguments(
        tuner_type=NAME,
        tuner_backend="peft",
        is_adapter=True,
        resume_from_checkpoint=None,
        adapters=[],
        use_galore=False,
        use_liger_kernel=False,
        sequence_parallel_size=1,
    )
    model = TunerMixin.prepare_model(args, make("llama"))
    shake(model)
    tuners_map[NAME].save_pretrained(model, str(tmp_path))
    args.adapters = [str(tmp_path)]
    again = TunerMixin.prepare_model(args, make("llama"))
    inputs = batch("llama")
    assert torch.equal(again.eval()(**inputs).logits, model.eval()(**inputs).logits)
