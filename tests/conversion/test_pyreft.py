"""Conversion from and to pyreft, within the error budget.

Models saved by pyreft compute the same edit after conversion, and converted models load in pyreft.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import PeftModel

from reft_kernels.adapter_files import ConversionError
from reft_kernels.conversion.common import Options
from reft_kernels.convert import convert, load
from tests.conversion import folders
from tests.conversion.exact_edit import exact, ids
from tests.model.families import BATCH, LENGTH, make, stacks, within

pyreft = pytest.importorskip("pyreft", reason="pyreft is not installed")

FIRST, LAST = [0, 1, 2], [LENGTH - 2, LENGTH - 1]
POSITIONS = Options(positions="f3+l2")
MEMBERS = pytest.mark.parametrize("member", list(folders.CLASSES))
UNTIED = pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])


def ours(folder, dtype=torch.float32):
    model = PeftModel.from_pretrained(make("llama").to(dtype), folder).eval()
    with torch.no_grad():
        return model(input_ids=ids()).logits, model


def theirs(reft, untied: bool, count: int):
    columns = [FIRST] * count + [LAST] * count if untied else [FIRST + LAST] * (2 * count)
    locations = [[c] * BATCH for c in columns[: count * (1 + untied)]]
    for intervention in reft.interventions.values():  # pyreft loads them in training mode
        intervention.eval()
    with torch.no_grad():
        return reft({"input_ids": ids()}, unit_locations={"sources->base": (None, locations)})[
            1
        ].logits


@UNTIED
@MEMBERS
def test_models_saved_by_pyreft_compute_the_same_edit(tmp_path, member, untied):
    reft, _ = folders.pyreft_model(member, untied=untied)
    reft.save(tmp_path / "pyreft")
    adapter = convert(tmp_path / "pyreft", tmp_path / "peft", "peft", options=POSITIONS)
    got, model = ours(tmp_path / "peft")
    plain, reference = theirs(reft, untied, 2), exact(adapter, 3, 2)
    assert within(got, plain, reference)
    with torch.no_grad(), model.disable_adapter():
        untouched = model(input_ids=ids()).logits
    # the edit has an effect
    assert (got - untouched).abs().max() > 100 * (got - reference).abs().max()


@UNTIED
@pytest.mark.parametrize("member", ["loreft", "consreft", "lobireft", "direft"])
def test_converted_models_load_with_reft_model_load(tmp_path, member, untied):
    """In bf16, the only dtype in which pyreft's load creates a learned source."""
    folders.peft_folder(tmp_path / "peft", intervention=member, share_weights=not untied)
    adapter = convert(tmp_path / "peft", tmp_path / "pyreft", "pyreft")
    reft = pyreft.ReftModel.load(str(tmp_path / "pyreft"), make("llama").to(torch.bfloat16))
    rounded = load(tmp_path / "pyreft", "pyreft", Options())
    got, plain = ours(tmp_path / "peft", torch.bfloat16)[0], theirs(reft, untied, 3)
    assert plain.dtype == got.dtype == torch.bfloat16 and rounded.positions == "f3+l2"
    assert within(got, plain, exact(adapter, 3, 2))
    R = {f"{n}.{i}": w["write"] for n, i, w in adapter.sets()}
    for (name, intervention), (layer, index) in zip(
        reft.interventions.items(),
        [(n, i) for i in range(1 + untied) for n in adapter.layers],
        strict=True,
    ):
        assert f"layer_{layer}_" in name and name.endswith(f"#{index}")
        assert torch.equal(intervention.rotate_layer.weight.mT, R[f"{layer}.{index}"])


@UNTIED
@MEMBERS
def test_converted_models_load_into_interventions(tmp_path, member, untied):
    """In fp32, into interventions created with that dtype: the conversion is exact."""
    folders.peft_folder(tmp_path / "peft", intervention=member, share_weights=not untied)
    adapter = convert(
        tmp_path / "peft", tmp_path / "pyreft", "pyreft", options=Options(dtype="float32")
    )
    reft, _ = folders.pyreft_model(member, layers=(0, 1, 2), untied=untied)
    for name, intervention in reft.interventions.items():
        intervention.load_state_dict(
            torch.load(tmp_path / "pyreft" / f"intkey_{name}.bin", weights_only=True)
        )
    got, model = ours(tmp_path / "peft")
    assert len(stacks(model)) == 1
    assert within(got, theirs(reft, untied, 3), exact(adapter, 3, 2))


def with_dots(folder):
    """Rename a folder's files as pyvene before 0.1.7 did."""
    for path in list(folder.glob("intkey_*.bin")):
        key = path.name.removeprefix("intkey_").removesuffix(".bin")
        place, _, index = key.partition("#")
        if place.startswith("layer_"):
            for word in ("_comp_", "_unit_", "_nunit_"):
                place = place.replace(word, f".{word[1:-1]}.")
            place = place.replace("layer_", "layer.", 1)
        path.rename(folder / f"intkey_{place}#{index}.bin")


@pytest.mark.parametrize("config", [True, False], ids=["config", "no_config"])
@pytest.mark.parametrize("dots", [False, True], ids=["underscores", "dots"])
@UNTIED
def test_both_spellings_with_and_without_config(tmp_path, untied, dots, config):
    reft, interventions = folders.pyreft_model(untied=untied)
    reft.save(tmp_path / "a")
    if dots:
        with_dots(tmp_path / "a")
        assert (tmp_path / "a" / "intkey_layer.0.comp.block_output.unit.pos.nunit.1#0.bin").exists()
    if not config:
        (tmp_path / "a" / "config.json").unlink()
    adapter = load(tmp_path / "a", "pyreft", Options(positions="f3+l2", layers=[0, 2]))
    order = [adapter.layers[n][i] for i in range(1 + untied) for n in (0, 2)]
    for weights, intervention in zip(order, interventions, strict=True):
        assert torch.equal(weights["write"].mT, intervention.rotate_layer.weight)
        assert torch.equal(weights["read"], intervention.learned_source.weight)
    assert adapter.component == "block_output" and adapter.intervention == "loreft"


@pytest.mark.parametrize("config", [True, False], ids=["config", "no_config"])
def test_a_string_component(tmp_path, config):
    reft, _ = folders.pyreft_model(layers=(1,), component="model.layers[{layer}].output")
    reft.save(tmp_path / "a")
    assert (tmp_path / "a" / "intkey_comp_model_layers[1]_output_unit_pos_nunit_1#0.bin").exists()
    if not config:
        (tmp_path / "a" / "config.json").unlink()
    adapter = convert(tmp_path / "a", tmp_path / "b", "peft", options=POSITIONS)
    assert adapter.component == "model.layers.{layer}" and list(adapter.layers) == [1]
    assert within(ours(tmp_path / "b")[0], theirs(reft, False, 1), exact(adapter, 3, 2))
    adapter = convert(tmp_path / "b", tmp_path / "c", "pyreft")
    assert (tmp_path / "c" / "intkey_comp_model_layers[1]_output_unit_pos_nunit_1#0.bin").exists()
    assert any("load_intervention" in note for note in adapter.notes)


def test_an_inner_string_component_needs_config_or_component(tmp_path):
    reft, _ = folders.pyreft_model(
        layers=(0, 2), component="model.layers[{layer}].self_attn.o_proj.output"
    )
    reft.save(tmp_path / "a")
    path = "model.layers.{layer}.self_attn.o_proj"
    adapter = convert(tmp_path / "a", tmp_path / "b", "peft", options=POSITIONS)
    assert adapter.component == path
    assert within(ours(tmp_path / "b")[0], theirs(reft, False, 2), exact(adapter, 3, 2, path=path))
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(ConversionError, match="say --component"):
        convert(tmp_path / "a", tmp_path / "c", "peft", options=POSITIONS)
    adapter = load(tmp_path / "a", "pyreft", Options(positions="f3+l2", component=path))
    assert list(adapter.layers) == [0, 2]


def test_positions_are_required(tmp_path):
    reft, _ = folders.pyreft_model(untied=True)
    reft.save(tmp_path / "a")
    with pytest.raises(ConversionError, match="say --positions"):
        convert(tmp_path / "a", tmp_path / "b", "peft")
    with pytest.raises(
        ConversionError, match="'f3', expected 'fN\\+lM': the source has two interventions a layer"
    ):
        convert(tmp_path / "a", tmp_path / "b", "peft", options=Options(positions="f3"))
    with pytest.raises(ConversionError, match="layers: got \\[1\\], but the source has \\[0, 2\\]"):
        convert(
            tmp_path / "a", tmp_path / "b", "peft", options=Options(positions="f3+l2", layers=[1])
        )
    assert not (tmp_path / "b").exists()
    adapter = convert(
        tmp_path / "a", tmp_path / "b", "peft", options=Options(positions="f3+l2", layers=[2])
    )
    assert list(adapter.layers) == [2]


def test_old_keys_become_new_ones(tmp_path):
    """Converting pyreft to pyreft makes an old folder loadable with a new pyvene."""
    reft, _ = folders.pyreft_model(dtype=torch.bfloat16)
    reft.save(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "old")
    with_dots(tmp_path / "old")
    convert(tmp_path / "old", tmp_path / "b", "pyreft")
    for path in (tmp_path / "a").glob("intkey_*.bin"):
        before, after = (
            torch.load(folder / path.name, weights_only=True)
            for folder in (tmp_path / "a", tmp_path / "b")
        )
        assert before.keys() == after.keys() and all(
            torch.equal(before[k], after[k]) for k in before
        )
    pyreft.ReftModel.load(str(tmp_path / "b"), make("llama").to(torch.bfloat16))


def test_noreft_with_a_bias_of_its_projection(tmp_path):
    """b2 is folded into b and restored."""
    reft, interventions = folders.pyreft_model("noreft")
    for intervention in interventions:
        intervention.proj_layer.bias = torch.nn.Parameter(torch.randn(folders.RANK))
    reft.save(tmp_path / "a")
    adapter = convert(tmp_path / "a", tmp_path / "b", "peft", options=POSITIONS)
    folded = {
        n: [{**w, "bias": w["bias"] - w["subtract_bias"]} for w in sets]
        for n, sets in adapter.layers.items()
    }
    adapter.layers = folded
    assert within(ours(tmp_path / "b")[0], theirs(reft, False, 2), exact(adapter, 3, 2))
    convert(tmp_path / "b", tmp_path / "c", "pyreft")
    for path in (tmp_path / "a").glob("intkey_*.bin"):
        before, after = (
            torch.load(folder / path.name, weights_only=True)
            for folder in (tmp_path / "a", tmp_path / "c")
        )
        assert before.keys() == after.keys() and all(
            torch.equal(before[k], after[k]) for k in before
        )
    with pytest.raises(ConversionError, match="add_bias"):
        convert(
            tmp_path / "a",
            tmp_path / "d",
            "peft",
            options=Options(positions="f3+l2", activation="relu"),
        )
