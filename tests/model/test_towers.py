"""Components of special families: modules, widths, streams and layouts, compared with a plain run."""

from __future__ import annotations

import pytest

from reft_kernels.model import ROLES, resolve
from tests.model.shape_recording import fits, record
from tests.model.tower_components import COMPONENTS
from tests.model.towers import MODELS, batch, make


@pytest.mark.parametrize(
    ("family", "name", "layers", "path", "width", "backbone", "stream", "layout"), COMPONENTS
)
def test_places(family, name, layers, path, width, backbone, stream, layout):
    model = make(family)
    component = resolve(model, name, layers)
    targets = component.targets
    first, _, other = path.partition("|")
    # the name depends on the version of transformers
    choices = (first, other, f"{first.rsplit('.', 1)[0]}.{other}")
    assert targets[0].path in choices and component.backbone == backbone
    assert {(t.embed_dim, t.stream, t.layout) for t in targets} == {(width, stream, layout)}
    shapes, calls = record(model, component, batch(family))
    assert calls and all(shapes), "the backbone or a place did not run"
    for seen in shapes:
        assert all(shape[-1] == width for shape in seen)
        if stream == "tokens":
            assert all(fits(shape, layout, calls[0]) for shape in seen)


@pytest.mark.parametrize("family", ["bart", "blip2_t5", "bert2bert", "trocr", "whisper"])
def test_sides(family):
    model = make(family)
    for side in ("encoder", "decoder"):
        component = resolve(model, f"{side}.block_output")
        assert (component.encoder, component.decoder) == (side == "encoder", side == "decoder")
    assert resolve(model, "block_output").encoder


def test_stages_of_growing_width():
    model = make("swin")
    component = resolve(model, "block_output")
    shapes, _ = record(model, component, batch("swin"))
    assert (
        [t.embed_dim for t in component.targets]
        == [shape[0][-1] for shape in shapes]
        == [32, 64, 64]
    )
    entered = resolve(model, "block_input")
    shapes, _ = record(model, entered, batch("swin"))
    assert (
        [t.embed_dim for t in entered.targets] == [shape[0][-1] for shape in shapes] == [16, 32, 64]
    )


def test_what_the_attention_of_zamba_reads_is_wider_than_the_stream():
    model = make("zamba")
    component = resolve(model, "attention_input", [1])
    shapes, _ = record(model, component, batch("zamba"))
    assert component.targets[0].embed_dim == shapes[0][0][-1] == 64


@pytest.mark.parametrize("family", ["xlm"])
def test_modules_of_a_family_without_blocks_are_named_by_path(family):
    model = make(family)
    for path in ("attentions.{layer}", "ffns.{layer}"):
        component = resolve(model, path)
        shapes, calls = record(model, component, batch(family))
        assert len(component.targets) == 3 and all(fits(s[0], "btd", calls[0]) for s in shapes)


def test_attention_and_mixers_never_share_a_module():
    for family in (
        "qwen3_next",
        "lfm2",
        "recurrent_gemma",
        "minimax",
        "kimi_linear",
        "zamba",
        "mamba",
        "rwkv",
        "bart",
        "switch",
    ):
        if family not in MODELS:
            continue
        try:
            model = make(family)
        except pytest.skip.Exception:
            continue
        by_role: dict[str, set[str]] = {role: set() for role in ROLES}
        for role, role_paths in by_role.items():
            for layer in range(2):
                try:
                    role_paths.update(t.path for t in resolve(model, role, [layer]).targets)
                except ValueError as error:
                    assert str(error).startswith(("component:", "layers:"))
        assert not by_role["attention_output"] & by_role["mixer_output"]
        paths = by_role["attention_output"]
        assert not any("encoder_attn" in path or "linear_attn" in path for path in paths)
