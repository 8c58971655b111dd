"""The conversion command: messages, errors, and atomic writes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from reft_kernels import adapter_files
from reft_kernels import convert as command
from tests.conversion import folders
from tests.conversion.command_line import contents, refused, run
from tests.model.families import make


def test_formats_are_detected(tmp_path, peft, pyreft, hub, capsys):
    for folder, form in ((peft, "peft"), (pyreft, "pyreft"), (hub, "adapterhub")):
        assert command.detect(folder) == form
    assert run(hub, tmp_path / "out", "--to", "peft") == 0
    captured = capsys.readouterr()
    assert "loreft, rank 4, width 32, layers [0, 2]" in captured.out


def test_it_is_a_module_with_a_help():
    done = subprocess.run(
        [sys.executable, "-m", "reft_kernels.convert", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for word in (
        "pyreft",
        "adapterhub",
        "peft",
        "--layers",
        "--positions",
        "--component",
        "--base-model",
        "--dtype",
        "--force",
    ):
        assert word in done.stdout


def test_flags_reach_the_folder(tmp_path, hub):
    assert (
        run(
            hub,
            tmp_path / "out",
            "--to",
            "peft",
            "--positions",
            "l1",
            "--base-model",
            "some/model",
            "--layers",
            "2",
        )
        == 0
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["positions"], config["base_model_name_or_path"], config["layers"]) == (
        "l1",
        "some/model",
        [2],
    )
    assert run(hub, tmp_path / "half", "--to", "peft", "--dtype", "bfloat16") == 0
    dtypes = {
        k.rsplit(".", 1)[-1]: t.dtype
        for k, t in load_file(tmp_path / "half" / "adapter_model.safetensors").items()
    }
    assert dtypes == {
        "X": torch.float32,
        "signs": torch.float32,
        "W": torch.bfloat16,
        "b": torch.bfloat16,
    }


def test_pyrefts_way_of_counting_positions(tmp_path, pyreft):
    """The option is kept through formats that cannot store it."""

    def counted(folder) -> bool:
        return json.loads((folder / "adapter_config.json").read_text())["pyreft_positions"]

    assert run(pyreft, tmp_path / "a", "--to", "peft") == 0 and not counted(tmp_path / "a")
    assert run(pyreft, tmp_path / "b", "--to", "peft", "--pyreft-positions") == 0 and counted(
        tmp_path / "b"
    )
    assert run(tmp_path / "b", tmp_path / "c", "--to", "pyreft") == 0
    assert run(tmp_path / "c", tmp_path / "d", "--to", "peft") == 0 and counted(tmp_path / "d")


def test_blocks_are_found_in_the_base_model(tmp_path, peft):
    make("llama").save_pretrained(tmp_path / "base")
    assert run(peft, tmp_path / "out", "--to", "adapterhub", "--base-model", tmp_path / "base") == 0
    keys = torch.load(tmp_path / "out" / "pytorch_adapter.bin", weights_only=True)
    assert "model.layers.1.reft_layer.refts.reft.units.0.learned_source.weight" in keys
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["config"]["layers"] == "all" and config["model_class"] == "LlamaForCausalLM"


# what a target cannot express


@pytest.mark.parametrize(
    ("settings", "target", "expected"),
    [
        ({"intervention": "consreft"}, "adapterhub", "AdapterHub has no consreft"),
        ({"intervention": "lobireft"}, "adapterhub", "AdapterHub has no lobireft"),
        ({"intervention": "red"}, "pyreft", "red (scale * h + bias) has no counterpart"),
        (
            {"positions": "prompt"},
            "adapterhub",
            "got 'prompt', but AdapterHub edits first and last tokens only",
        ),
        (
            {"positions": "all"},
            "adapterhub",
            "got 'all', but AdapterHub edits first and last tokens only",
        ),
        (
            {"component": "mlp_output"},
            "adapterhub",
            "got 'mlp_output', but AdapterHub edits the output of blocks only",
        ),
        (
            {"component": "model.layers.{layer}.mlp", "layers": [1]},
            "adapterhub",
            "AdapterHub edits the output of blocks only",
        ),
        ({}, "adapterhub", "say --base-model"),
        (
            {"pyreft_positions": True},
            "adapterhub",
            "pyreft_positions: got True, but AdapterHub counts the last token",
        ),
        (
            {"activation": "relu"},
            "pyreft",
            "got 'relu', but a pyreft folder has no place for act_fn",
        ),
        ({"component": "mlp_activation"}, "pyreft", "differs in gated MLPs"),
        ({"component": "model.layers.{layer}.mlp"}, "pyreft", "need not be 0 to 2; say --layers"),
        ({"modules_to_save": ["lm_head"]}, "pyreft", "--without-head leaves them out"),
    ],
)
def test_what_the_target_cannot_express(tmp_path, capsys, settings, target, expected):
    folders.peft_folder(tmp_path / "peft", **settings)
    refused(capsys, tmp_path, expected, tmp_path / "peft", tmp_path / "out", "--to", target)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"non_linearity": "leakyrelu"}, "non_linearity: activation: got 'leakyrelu'"),
        ({"non_linearity": "quick_gelu"}, "got 'quick_gelu', expected one of linear, relu"),
        ({"architecture": "lora"}, "architecture is 'lora', expected 'reft'"),
        ({"architecture": "union"}, "architecture is 'union', expected 'reft'"),
        ({"orthogonality": False}, "as its configuration says"),
        ({"tied_weights": False}, "has units [0], expected 2"),
        ({"layers": [0, 1]}, "the configuration says [0, 1], the file holds [0, 2]"),
        ({"prefix_positions": 0, "suffix_positions": 0}, "expected one above 0"),
    ],
)
def test_invalid_or_unsupported_hub_settings_raise(tmp_path, capsys, hub, settings, expected):
    content = json.loads((hub / "adapter_config.json").read_text())
    content["config"] |= settings
    (hub / "adapter_config.json").write_text(json.dumps(content))
    refused(capsys, tmp_path, expected, hub, tmp_path / "out", "--to", "peft")


def test_an_encoder_decoder_and_a_head(tmp_path, capsys, hub):
    torch.save({"classifier.weight": torch.zeros(2, 2)}, hub / "pytorch_model_head.bin")
    refused(
        capsys,
        tmp_path,
        "a prediction head, which is not converted",
        hub,
        tmp_path / "out",
        "--to",
        "peft",
    )
    assert run(hub, tmp_path / "out", "--to", "peft", "--without-head") == 0
    content = json.loads((hub / "adapter_config.json").read_text())
    (hub / "adapter_config.json").write_text(json.dumps({**content, "model_type": "t5"}))
    arguments = (hub, tmp_path / "other", "--to", "peft", "--without-head")
    capsys.readouterr()
    refused(capsys, tmp_path, "'t5' counts layers over encoder and decoder", *arguments)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("component", "mlp_activation", "pyvene's 'mlp_activation' has no certain counterpart"),
        ("component", "query_output", "pyvene's 'query_output' has no certain counterpart"),
        ("unit", "h.pos", "unit: got 'h.pos' with 1 units"),
        ("max_number_of_units", 2, "unit: got 'pos' with 2 units"),
        ("intervention_link_key", 0, "intervention_link_key: got 0"),
        ("moe_key", 1, "moe_key: got 1"),
    ],
)
def test_unsupported_pyreft_settings_raise(tmp_path, capsys, pyreft, field, value, expected):
    names = (
        "layer",
        "component",
        "unit",
        "max_number_of_units",
        "low_rank_dimension",
        "intervention_type",
        "intervention",
        "subspace_partition",
        "group_key",
        "intervention_link_key",
        "moe_key",
    )
    config = json.loads((pyreft / "config.json").read_text())
    for entry in config["representations"]:
        entry[names.index(field)] = value
    (pyreft / "config.json").write_text(json.dumps(config))
    for layer in range(3):
        values = {
            "component": "block_output",
            "unit": "pos",
            "max_number_of_units": 1,
            field: value,
        }
        old = pyreft / f"intkey_layer_{layer}_comp_block_output_unit_pos_nunit_1#0.bin"
        old.rename(
            pyreft
            / "intkey_layer_{}_comp_{component}_unit_{unit}_nunit_{max_number_of_units}#0.bin".format(
                layer, **{**values, "unit": values["unit"].replace(".", "_")}
            )
        )
    capsys.readouterr()
    refused(capsys, tmp_path, expected, pyreft, tmp_path / "out", "--to", "peft")


def test_a_foreign_class_is_named(tmp_path, capsys, pyreft):
    config = json.loads((pyreft / "config.json").read_text())
    config["intervention_types"] = ["<class '__main__.SubloreftIntervention'>"] * 3
    (pyreft / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    refused(
        capsys,
        tmp_path,
        "got SubloreftIntervention, expected one of",
        pyreft,
        tmp_path / "out",
        "--to",
        "peft",
    )


def test_a_head_in_a_pyreft_folder(tmp_path, capsys, pyreft):
    # save_intervention writes an empty file if nothing else is trained
    torch.save({}, pyreft / "pytorch_model.bin")
    assert run(pyreft, tmp_path / "out", "--to", "peft") == 0
    torch.save({"score.weight": torch.nn.Parameter(torch.zeros(2))}, pyreft / "pytorch_model.bin")
    capsys.readouterr()
    refused(
        capsys,
        tmp_path,
        "trained parameters of the model (score.weight)",
        pyreft,
        tmp_path / "other",
        "--to",
        "peft",
    )
    assert run(pyreft, tmp_path / "other", "--to", "peft", "--without-head") == 0


@pytest.mark.parametrize(
    ("member", "choices"),
    [
        ("loreft", None),
        ("direft", None),
        ("noreft", ("noreft", "nodireft")),
        ("nodireft", ("noreft", "nodireft")),
        ("consreft", ("consreft", "lobireft")),
        ("lobireft", ("consreft", "lobireft")),
    ],
)
def test_without_config_settings_are_inferred_from_the_state(tmp_path, capsys, member, choices):
    folders.peft_folder(tmp_path / "peft", intervention=member)
    assert run(tmp_path / "peft", tmp_path / "pyreft", "--to", "pyreft") == 0
    (tmp_path / "pyreft" / "config.json").unlink()
    arguments = (tmp_path / "pyreft", tmp_path / "out", "--to", "peft")
    capsys.readouterr()
    if choices is not None:
        refused(capsys, tmp_path, f"may be {choices[0]} or {choices[1]}", *arguments)
        arguments += ("--intervention", member)
    assert run(*arguments) == 0
    assert (
        json.loads((tmp_path / "out" / "adapter_config.json").read_text())["intervention"] == member
    )


@pytest.mark.parametrize(
    ("version", "stored", "activation"),
    [
        ("adapters.1.3.0", "gelu", "gelu"),
        (None, "gelu", "gelu_tanh"),
        (None, "gelu_orig", "gelu"),
        ("adapters.1.3.0", "gelu_new", "gelu_tanh"),
        ("adapters.1.3.0", "swish", "silu"),
        ("adapters.1.3.0", None, "linear"),
    ],
)
def test_activations_of_old_and_new_hub_folders(tmp_path, hub, version, stored, activation):
    content = json.loads((hub / "adapter_config.json").read_text())
    content["config"]["non_linearity"] = stored
    if version is None:
        del content["version"]
    (hub / "adapter_config.json").write_text(json.dumps(content))
    assert run(hub, tmp_path / "out", "--to", "peft") == 0
    assert (
        json.loads((tmp_path / "out" / "adapter_config.json").read_text())["activation"]
        == activation
    )


# atomic writes


def test_a_folder_that_is_not_empty_is_kept_or_replaced_whole(tmp_path, capsys, peft, hub):
    target = tmp_path / "out"
    target.mkdir()
    assert run(hub, target, "--to", "peft") == 0  # an empty folder is accepted
    (target / "notes.txt").write_text("mine")
    before = contents(target)
    capsys.readouterr()
    refused(capsys, tmp_path, "is not empty; --force replaces it", peft, target, "--to", "pyreft")
    assert contents(target) == before
    assert run(peft, target, "--to", "pyreft", "--force") == 0
    assert "config.json" in contents(target) and "notes.txt" not in contents(target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub", "out", "peft"]


def test_a_file_in_the_way(tmp_path, capsys, peft):
    (tmp_path / "out").write_text("mine")
    refused(
        capsys,
        tmp_path,
        "exists and is not a folder",
        peft,
        tmp_path / "out",
        "--to",
        "pyreft",
        "--force",
    )


@pytest.mark.parametrize("place", ["write", "rename"])
def test_a_failure_half_way_leaves_the_old(tmp_path, monkeypatch, capsys, peft, hub, place):
    target = tmp_path / "out"
    assert run(hub, target, "--to", "peft") == 0
    before = contents(target)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    if place == "write":
        monkeypatch.setattr(torch, "save", fail)
    else:
        rename = adapter_files.Path.rename

        def once(path, new):
            if ".new-" in path.name:
                fail()
            return rename(path, new)

        monkeypatch.setattr(adapter_files.Path, "rename", once)
    capsys.readouterr()
    refused(capsys, tmp_path, "no space left on device", peft, target, "--to", "pyreft", "--force")
    assert contents(target) == before


def test_a_folder_may_replace_itself(tmp_path, hub):
    assert run(hub, hub, "--to", "peft", "--force") == 0
    assert command.detect(hub) == "peft"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub"]


def test_it_imports_no_framework():
    code = (
        "import sys, reft_kernels.convert; print({'transformers', 'peft', 'pyreft', 'pyvene', "
        "'adapters'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
