"""Round trips between every two formats: R, W, b and X are restored bit for bit.

Also what a single conversion keeps, and the accuracy of X where it cannot be exact.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from reft_kernels.conversion import exact
from reft_kernels.conversion.common import Options, bits
from reft_kernels.convert import convert, load
from reft_kernels.integrations.torch_orthogonal_state import evaluate, state
from reft_kernels.parametrization import INVERSES, build
from tests.conversion import folders
from tests.model.families import LAYERS, stacks
from tests.plain import MAPS
from tests.plain import householder as plain_householder

POSITIONS = Options(positions="f3+l2")
# gives the path of the blocks instead of --base-model
BLOCKS = Options(component="model.layers.{layer}")
SHARED = ("loreft", "direft", "noreft", "nodireft")  # AdapterHub has no consreft and no lobireft
UNTIED = pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(bits(left), bits(right))


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return bool(left) and left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def peft_tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def pyreft_tensors(folder):
    """Return every tensor of a pyreft folder by file and name, with R for its parametrization."""
    held = {}
    for path in sorted(folder.glob("intkey_*.bin")):
        state = torch.load(path, weights_only=True)
        held |= {f"{path.name} {k}": t for k, t in state.items() if "parametrizations" not in k}
        parts = [state.get(f"rotate_layer.{name}") for name in (folders.ORIGINAL, folders.BASE)]
        if parts[0] is not None:
            held[f"{path.name} R"] = evaluate(*parts, path.name)
    return held


@UNTIED
@pytest.mark.parametrize("parametrization", ["householder", "cayley"])
@pytest.mark.parametrize(
    ("member", "middle"),
    [
        *((member, "pyreft") for member in folders.CLASSES),
        *((member, "adapterhub") for member in SHARED),
    ],
)
def test_peft_there_and_back(tmp_path, member, middle, parametrization, untied):
    folders.peft_folder(
        tmp_path / "a",
        intervention=member,
        parametrization=parametrization,
        share_weights=not untied,
        layers=[2, 0],
        dropout=0.1,
        response_template=[[5, 6], [7]],
    )
    convert(
        tmp_path / "a", tmp_path / "b", middle, options=BLOCKS if middle == "adapterhub" else None
    )
    convert(tmp_path / "b", tmp_path / "c", "peft")
    assert equal(peft_tensors(tmp_path / "a"), peft_tensors(tmp_path / "c"))
    old, new = config_of(tmp_path / "a"), config_of(tmp_path / "c")
    kept = {
        "layers",
        "rank",
        "positions",
        "share_weights",
        "intervention",
        "activation",
        "dropout",
        "parametrization",
        "init",
    }
    kept |= {"response_template"}
    assert {k: old[k] for k in kept} == {k: new[k] for k in kept}


@UNTIED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("member", "middle"),
    [
        *((member, "peft") for member in folders.CLASSES),
        *((member, "adapterhub") for member in SHARED),
    ],
)
def test_pyreft_there_and_back(tmp_path, member, middle, dtype, untied):
    pytest.importorskip("pyreft", reason="pyreft is not installed")
    reft, _ = folders.pyreft_model(member, untied=untied, dtype=dtype)
    reft.save(tmp_path / "a")
    options = (
        Options(positions="f3+l2", component="model.layers.{layer}")
        if middle == "adapterhub"
        else POSITIONS
    )
    convert(tmp_path / "a", tmp_path / "b", middle, options=options)
    convert(tmp_path / "b", tmp_path / "c", "pyreft", options=Options(component="block_output"))
    assert equal(pyreft_tensors(tmp_path / "a"), pyreft_tensors(tmp_path / "c"))
    left, right = (json.loads((tmp_path / n / "config.json").read_text()) for n in "ac")
    for name in (
        "representations",
        "intervention_types",
        "sorted_keys",
        "intervention_constant_sources",
        "model_type",
        "mode",
        "intervention_dimensions",
    ):
        assert left.get(name) == right.get(name), name


@pytest.mark.parametrize("safetensors", [False, True], ids=["bin", "safetensors"])
@pytest.mark.parametrize(
    "ends", [(3, 2, True), (3, 2, False), (3, 0, False), (0, 2, False), (0, 2, True)]
)
@pytest.mark.parametrize("orthogonality", [True, False], ids=["orthogonal", "free"])
@pytest.mark.parametrize("middle", ["pyreft", "peft"])
def test_adapterhub_there_and_back(tmp_path, middle, orthogonality, ends, safetensors):
    prefix, suffix, tied = ends
    held = folders.hub_folder(
        tmp_path / "a",
        orthogonality=orthogonality,
        prefix=prefix,
        suffix=suffix,
        tied=tied,
        layers=None,
        safetensors=safetensors,
    )
    convert(tmp_path / "a", tmp_path / "b", middle)
    convert(tmp_path / "b", tmp_path / "c", "adapterhub")
    assert equal(held, folders.hub_weights(tmp_path / "c"))
    old, new = config_of(tmp_path / "a"), config_of(tmp_path / "c")
    assert new["config"].pop("subtract_projection") is True
    assert old == new


def test_a_chain_through_all_formats(tmp_path):
    """Values that pyreft rounds to bf16 are restored after several conversions."""
    folders.peft_folder(tmp_path / "a", share_weights=False)
    adapter = convert(tmp_path / "a", tmp_path / "b", "pyreft")
    assert any("rounded to bfloat16" in note for note in adapter.notes)
    assert next(iter(pyreft_tensors(tmp_path / "b").values())).dtype == torch.bfloat16
    convert(tmp_path / "b", tmp_path / "c", "adapterhub", options=BLOCKS)
    convert(tmp_path / "c", tmp_path / "d", "pyreft")
    convert(tmp_path / "d", tmp_path / "e", "peft")
    assert equal(peft_tensors(tmp_path / "a"), peft_tensors(tmp_path / "e"))


def test_one_conversion_keeps_the_models_R(tmp_path):
    """The other framework's folder has R with the same bits as our model."""
    model = folders.peft_folder(tmp_path / "a", layers="all")
    (stack,) = stacks(model)
    convert(tmp_path / "a", tmp_path / "pyreft", "pyreft", options=Options(dtype="float32"))
    convert(tmp_path / "a", tmp_path / "hub", "adapterhub", options=BLOCKS)
    hub = folders.hub_weights(tmp_path / "hub")
    for layer in range(LAYERS):
        state = torch.load(
            tmp_path / "pyreft" / f"intkey_layer_{layer}_comp_block_output_unit_pos_nunit_1#0.bin",
            weights_only=True,
        )
        assert same(state["rotate_layer"].mT, stack.R[layer]) and same(
            state["weight"], stack.W[layer].detach()
        )
        assert same(hub[f"{layer}.0.write"], stack.R[layer]) and same(
            hub[f"{layer}.0.bias"], stack.b[layer].detach()
        )


def test_pyreft_and_adapterhub_need_no_extra_file(tmp_path):
    stated = {
        "pyreft": Options(positions="f3+l2", component="block_output", dtype="float32"),
        "adapterhub": Options(positions="f3+l2", component="model.layers.{layer}"),
    }
    held = folders.hub_folder(tmp_path / "adapterhub")
    previous = tmp_path / "adapterhub"
    for step, form in enumerate(("pyreft", "adapterhub", "pyreft")):
        convert(previous, tmp_path / str(step), form, options=stated[form])
        (tmp_path / str(step) / exact.FILE).unlink()
        previous = tmp_path / str(step)
    assert equal(held, folders.hub_weights(tmp_path / "1"))
    assert equal(pyreft_tensors(tmp_path / "0"), pyreft_tensors(tmp_path / "2"))


def test_changed_weights_take_precedence_over_the_extra_file(tmp_path):
    """The extra file is used only with the weights with which it was written."""
    folders.hub_folder(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "peft")
    trained = peft_tensors(tmp_path / "b")
    name = next(k for k in trained if k.endswith(".X"))
    trained[name] = trained[name] + 0.25
    save_file(trained, tmp_path / "b" / "adapter_model.safetensors", metadata={"format": "pt"})
    adapter = convert(tmp_path / "b", tmp_path / "c", "adapterhub", options=BLOCKS)
    assert any("belongs to other weights" in note for note in adapter.notes)
    signs = trained[name.replace(".X", ".signs")]
    expected = build("householder", trained[name], signs=signs)[0]
    assert same(folders.hub_weights(tmp_path / "c")["2.0.write"], expected[1])


def test_no_extra_tensors_where_the_folder_has_everything(tmp_path):
    folders.hub_folder(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "pyreft", "pyreft", options=Options(dtype="float32"))
    # the extra file has settings only: positions, dropout
    assert list(load_file(tmp_path / "pyreft" / exact.FILE)) == []
    assert load(tmp_path / "pyreft", "pyreft", Options()).dropout == 0.05


@pytest.mark.parametrize("parametrization", ["householder", "cayley"])
@pytest.mark.parametrize(("d", "r"), [(33, 4), (256, 8), (768, 16)])
def test_R_of_X_is_accurate_where_it_cannot_be_exact(parametrization, d, r):
    """The fp64 inverse, rounded to fp32, gives R within R's error budget."""
    ours, theirs = 0.0, 0.0
    for _ in range(4):
        R = torch.linalg.qr(torch.randn(d, r, dtype=torch.float64)).Q.mT.float()
        X, signs = (t.float() for t in INVERSES[parametrization](R.double()))
        ours = max(
            ours, float((build(parametrization, X, signs=signs)[0].double() - R).abs().max())
        )
        theirs = max(theirs, float((MAPS[parametrization](X, signs).double() - R).abs().max()))
    assert ours <= 2 * theirs + torch.finfo(torch.float32).eps * float(R.abs().max())


@pytest.mark.parametrize("shape", [(32, 4), (4, 32), (6, 6), (9, 1), (1, 1)])
def test_the_state_shows_exactly_the_weight(shape):
    """PyTorch's parametrization computes the same bits, also after training.

    Its base is orthonormal.
    """
    tall = torch.linalg.qr(torch.randn(max(shape), min(shape), dtype=torch.float64)).Q.float()
    weight = (tall if shape[0] >= shape[1] else tall.mT).contiguous()
    original, base = state(weight)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    torch.nn.utils.parametrizations.orthogonal(linear)
    linear.parametrizations.weight.load_state_dict({"original": original, "0.base": base})
    assert same(linear.weight.detach(), weight) and same(evaluate(original, base, "test"), weight)
    assert float((base.double().mT @ base.double() - torch.eye(len(base))).abs().max()) < 1e-6
    with torch.no_grad():
        noise = 0.3 * torch.randn(shape)
        linear.parametrizations.weight.original.add_(
            noise.tril(-1) if shape[0] >= shape[1] else noise.triu(1)
        )
    trained = linear.parametrizations.weight.original.detach()
    assert same(linear.weight.detach(), evaluate(trained, base, "test"))


@pytest.mark.parametrize("middle", ["pyreft", "peft"])
@pytest.mark.parametrize("rank", [1, 8])
def test_the_smallest_and_the_largest_rank(tmp_path, middle, rank):
    """PyTorch's parametrization has another map for square weights and does not transpose them."""
    held = folders.hub_folder(tmp_path / "a", rank=rank, width=8)
    convert(tmp_path / "a", tmp_path / "b", middle, options=Options(dtype="float32"))
    convert(tmp_path / "b", tmp_path / "c", "adapterhub")
    assert equal(held, folders.hub_weights(tmp_path / "c"))
    (tmp_path / "b" / exact.FILE).unlink()
    adapter = load(tmp_path / "b", middle, POSITIONS)
    for layer, (weights,) in adapter.layers.items():
        R = held[f"{layer}.0.write"]
        if middle == "pyreft":
            assert same(weights["write"], R)
        else:
            straightforward = plain_householder(weights["X"], weights["signs"])
            allowed = (
                2 * (straightforward - R).abs().max()
                + torch.finfo(torch.float32).eps * R.abs().max()
            )
            assert (weights["write"] - R).abs().max() <= allowed
