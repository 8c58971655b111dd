"""Conversion from and to the package ``adapters``.

Adapters saved by the package compute the same edit after conversion, and converted adapters load in
the package.
"""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from reft_kernels.conversion.common import Options
from reft_kernels.convert import convert
from reft_kernels.integrations.peft import ReftConfig
from tests.conversion import folders
from tests.conversion.exact_edit import exact, ids
from tests.model.families import make, shake, within

pytestmark = pytest.mark.transformers4

adapters = pytest.importorskip(
    "adapters", reason="adapters (AdapterHub) is not installed; it needs transformers 4.57"
)

ENDS = pytest.mark.parametrize(
    ("prefix", "suffix", "tied"),
    [(3, 2, True), (3, 2, False), (3, 0, False), (0, 2, True)],
    ids=str,
)


def hub_model(family: str = "llama", **settings):
    """Return a tiny model with one trained AdapterHub ReFT."""
    generator = torch.Generator().manual_seed(4)
    model = make(family)
    adapters.init(model)
    config = adapters.ReftConfig(
        **{"layers": [0, 2], "r": folders.RANK, "orthogonality": True, "dropout": 0.0, **settings}
    )
    model.add_adapter("demo", config=config)
    model.set_active_adapters("demo")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".refts." in name:
                noise = 0.2 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.triu(1) if "original" in name else noise)
    return model.eval()


def logits(model, family: str = "llama") -> torch.Tensor:
    tokens = ids()
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


@ENDS
@pytest.mark.parametrize("orthogonality", [True, False], ids=["orthogonal", "free"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_new"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_adapters_saved_by_adapters_compute_the_same_edit(
    tmp_path, family, activation, orthogonality, prefix, suffix, tied
):
    model = hub_model(
        family,
        prefix_positions=prefix,
        suffix_positions=suffix,
        tied_weights=tied,
        orthogonality=orthogonality,
        non_linearity=activation,
    )
    model.save_adapter(tmp_path / "hub", "demo", with_head=False)
    adapter = convert(tmp_path / "hub", tmp_path / "peft", "peft")
    assert adapter.intervention == (
        "loreft" if orthogonality else "noreft"
    ) and adapter.untied == bool(suffix and not tied)
    got = logits(PeftModel.from_pretrained(make(family), tmp_path / "peft").eval(), family)
    reference = exact(adapter, prefix, suffix, family)
    assert within(got, logits(model, family), reference)
    assert (got - logits(make(family), family)).abs().max() > 100 * (got - reference).abs().max()


@pytest.mark.parametrize("member", ["loreft", "direft", "noreft", "nodireft"])
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_converted_adapters_load_in_adapters(tmp_path, member, untied):
    """The folder has subtract_projection, which ``adapters`` 1.3.0 reads but does not save."""
    make("llama").save_pretrained(tmp_path / "base")
    ours = get_peft_model(
        make("llama"),
        ReftConfig(
            rank=4,
            intervention=member,
            init=None,
            positions="f3+l2",
            share_weights=not untied,
            activation="silu",
        ),
    )
    shake(ours)
    ours.eval().save_pretrained(tmp_path / "peft")
    adapter = convert(
        tmp_path / "peft",
        tmp_path / "hub",
        "adapterhub",
        options=Options(base_model=str(tmp_path / "base")),
    )
    model = make("llama")
    adapters.init(model)
    missing: dict = {}
    name = model.load_adapter(str(tmp_path / "hub"), set_active=True, loading_info=missing)
    assert name == "reft" and not missing["missing_keys"] and not missing["unexpected_keys"]
    assert within(logits(ours), logits(model.eval()), exact(adapter, 3, 2))
    units = [
        u
        for n, m in model.named_modules()
        for u in getattr(m, "units", [])
        if n.endswith("refts.reft")
    ]
    held = [w for sets in adapter.layers.values() for w in sets]
    assert len(units) == len(held) == 3 * (1 + untied)
    for unit, weights in zip(units, held, strict=True):
        assert torch.equal(unit.projection.weight, weights["write"]) and torch.equal(
            unit.learned_source.weight, weights["read"]
        )


def test_direft_is_saved_as_noreft_by_adapters(tmp_path):
    """adapters 1.3.0 does not save subtract_projection, so its DiReFT is loaded as NoReFT.

    The conversion does the same unless an option says otherwise.
    """
    model = make("llama")
    adapters.init(model)
    model.add_adapter("demo", config=adapters.DiReftConfig(r=2, dropout=0.0))
    model.set_active_adapters("demo")
    model.eval().save_adapter(tmp_path / "hub", "demo", with_head=False)
    again = make("llama")
    adapters.init(again)
    again.load_adapter(str(tmp_path / "hub"), set_active=True)
    adapter = convert(tmp_path / "hub", tmp_path / "a", "peft")
    assert adapter.intervention == "noreft" and any(
        "--intervention nodireft" in note for note in adapter.notes
    )
    assert within(logits(again.eval()), logits(again), exact(adapter, 3, 0))
    adapter = convert(
        tmp_path / "hub", tmp_path / "b", "peft", options=Options(intervention="nodireft")
    )
    got = logits(PeftModel.from_pretrained(make("llama"), tmp_path / "b").eval())
    assert within(got, logits(model), exact(adapter, 3, 0))
