"""Positions counted on the text or on the placeholders of images, compared with plain hooks."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel

from tests.families import checks
from tests.families.catalogue import FAMILIES
from tests.families.catalogue_vlm import IMAGE
from tests.families.family import Role, mark_prompt, places, text_tokens, without
from tests.families.oracle import plain_edits

NAMES = ("llava", "qwen2_vl", "gemma3", "paligemma", "smolvlm", "internvl")
SPECS = ("text:f3+l2", "text:l1", "image:f2+l1", "image", "text", "text:all", "image:all")


def expected(ids, prompt, spec):
    """Mask of the edited tokens by plain loops; ``prompt`` marks the tokens of the prompt."""
    modality, _, rest = spec.partition(":")
    wanted = torch.zeros_like(prompt)
    for row in range(len(ids)):
        columns = [c for c in range(ids.shape[1]) if prompt[row, c]]
        columns = [c for c in columns if (ids[row, c] == IMAGE) == (modality == "image")]
        if rest in ("", "prompt", "all"):
            wanted[row, columns] = True
            continue
        counts = {term[0]: int(term[1:]) for term in rest.split("+")}
        limit = len(columns) // 2 if len(counts) == 2 else len(columns)
        first, last = (min(counts.get(end, 0), limit) for end in "fl")
        wanted[row, columns[:first] + columns[len(columns) - last :]] = True
    return wanted


def edited(family, spec, **more):
    base, copied = checks.base_of(family), checks.base_of(family)
    torch.manual_seed(0)
    model = checks.attach(copied, "block_output", positions=spec, **more).eval()
    checks.shake(model, 7)
    at = places(base, family.role(), family.count)
    widths = checks.widths_of(base, at, checks.batches(family)[0])
    return base, model, at, checks.weights_of(checks.layers_in(model, widths))


def logits(model, batch):
    with torch.no_grad(), checks.calm():
        return checks.leading(checks.call(model, batch))


def several_images(batch):
    """The batch with its placeholders split by a token of text, where the family permits that."""
    ids = batch["input_ids"].clone()
    for row in ids:
        first = int((row == IMAGE).nonzero()[0])
        row[first - 1 : first + 2] = torch.tensor([IMAGE, IMAGE, 7])
    return {**batch, "input_ids": ids}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", SPECS)
def test_rows_are_those_of_plain_hooks(name, spec):
    family = FAMILIES[name]
    base, model, at, weights = edited(family, spec)
    cases = [(batch, batch, text_tokens(batch)) for batch in checks.batches(family)]
    if not spec.endswith("all"):  # of the prompt, where labels or lengths end it
        cases += [(inputs, bare, prompt) for _, inputs, bare, prompt in checks.labelled(family)]
    for inputs, bare, prompt in cases:
        tokens = expected(bare["input_ids"], prompt, spec)
        with plain_edits(base, at, weights, tokens, family.layout, choose=torch.clone):
            want = checks.meaningful(family, bare, logits(base, bare))
        got = checks.meaningful(family, bare, logits(model, inputs))
        unedited = checks.meaningful(family, bare, logits(base, bare))
        assert checks.distance(unedited, want) > 1e-4
        checks.close(got, want, checks.ROWS, spec)


def test_placeholders_apart_are_counted_together():
    family = FAMILIES["llava"]
    base, model, at, weights = edited(family, "text:f3+l2")
    batch = several_images(family.inputs("none", 2))
    tokens = expected(batch["input_ids"], text_tokens(batch), "text:f3+l2")
    with plain_edits(base, at, weights, tokens, family.layout, choose=torch.clone):
        want = logits(base, batch)
    checks.close(logits(model, batch), want, checks.ROWS, "two images")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", ["text:f3+l2", "image"])
def test_generates_with_the_prompts_edits(name, spec):
    family = FAMILIES[name]
    base, model, at, weights = edited(family, spec)
    batch = without(family.inputs("left", 2) or family.inputs("none", 2), "labels")
    for each in (base, model):
        settings = each.generation_config
        settings.eos_token_id, settings.pad_token_id = None, 0
        settings.suppress_tokens = list(range(88, 97))
    tokens = expected(batch["input_ids"], text_tokens(batch), spec)
    with plain_edits(
        base, at, weights, tokens, family.layout, prompt_only=True, choose=torch.clone
    ):
        want, want_logits = checks.generated(base, batch)
    got, got_logits = checks.generated(model, batch)
    assert torch.equal(got, want)
    checks.close(got_logits, want_logits, checks.ROWS, "logits")


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prefill_chunk_size": 3}])
def test_beams_and_chunks_count_as_the_whole_prompt(options):
    family = FAMILIES["llava"]
    _, model, _, _ = edited(family, "text:f3+l2")
    ids = torch.randint(5, 80, (2, 9), generator=torch.Generator().manual_seed(3))
    model.generation_config.eos_token_id = None
    plain = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), checks.calm():
        got = model.generate(input_ids=ids, **plain, **options)
        _, whole, _, _ = edited(family, "f3+l2")  # the same, since these prompts have no image
        whole.generation_config.eos_token_id = None
        assert torch.equal(got, whole.generate(input_ids=ids, **plain, **options))


def test_generated_text_is_edited_with_all():
    family = FAMILIES["llava"]
    _, model, _, _ = edited(family, "text:all")
    batch = family.inputs("none", 2)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = list(range(88, 97))
    tokens, steps = checks.generated(model, batch)
    whole = logits(model, {**batch, "input_ids": tokens[:, :-1]})
    checks.close(steps, whole[:, batch["input_ids"].shape[1] - 1 :], checks.ROWS, "steps")


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_trains_saves_and_loads(name, tmp_path):
    family = FAMILIES[name]
    base = checks.base_of(family)
    model = checks.attach(
        checks.base_of(family), "block_output", positions="text:f2+l2", share_weights=False
    )
    checks.shake(model, 7)
    batch = family.inputs("right", 2)
    labels, _, _ = mark_prompt(family, batch)
    model.train()
    model(**batch, labels=labels).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and all(g is not None and g.abs().max() > 0 for g in gradients)
    want = logits(model.eval(), batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(loaded, batch), want)


def test_without_token_ids_the_call_is_refused():
    family = FAMILIES["llava"]
    _, model, _, _ = edited(family, "text:l1")
    embeds = model.get_input_embeddings()(torch.randint(5, 80, (2, 6)))
    with pytest.raises(ValueError, match="^positions: text tokens are told .* by input_ids"):
        logits(model, {"inputs_embeds": embeds})


# component, path of the modules in version 5 of transformers and before, number of layers
CLIP_LAYERS = (
    "model.vision_tower.encoder.layers.{}",
    "model.vision_tower.vision_model.encoder.layers.{}",
)
TOWERS = {
    "llava": ("vision.block_output", CLIP_LAYERS, 3),
    "gemma3": ("vision.mlp_output", tuple(f"{p}.mlp" for p in CLIP_LAYERS), 3),
    "qwen2_vl": ("vision.block_output", ("model.visual.blocks.{}",), 2),
    "smolvlm": ("vision.block_output", ("model.vision_model.encoder.layers.{}",), 3),
    "internvl": ("vision.attention_output", ("model.vision_tower.encoder.layer.{}.attention",), 3),
    "paligemma": ("projector", ("model.multi_modal_projector",), 1),
    "qwen3_vl": ("vision.projector", ("model.visual.merger",), 1),
    "idefics3": ("projector", ("model.connector",), 1),
    "qwen2_audio": (
        "audio.block_output",
        ("model.audio_tower.layers.{}", "audio_tower.layers.{}"),
        3,
    ),
}


@pytest.mark.parametrize("name", TOWERS)
def test_towers_and_projectors_by_role(name):
    component, at, count = TOWERS[name]
    role = Role(component, at, layers=tuple(range(count)), tokens=False)
    checks.check_rows(FAMILIES[name], role=role)
    checks.check_gradients(FAMILIES[name], role=role)


BAD = [
    ("f1", "vision.block_output", "bert", "has no list of blocks in its tower of vision"),
    ("f1", "audio.projector", "llava", "has none by its modules' names; name the module by path"),
    ("video:f1", "block_output", "llava", "names no video_token_id; it names those of image"),
    ("image", "block_output", "bert", "names no image_token_id; it names those of no modality"),
    ("text:f1", "{tower}", "llava", "whose rows are not tokens"),
]


@pytest.mark.parametrize(("spec", "component", "name", "message"), BAD)
def test_refused_where_nothing_can_be_counted(spec, component, name, message):
    family = FAMILIES[name]
    component = component.replace("{tower}", FAMILIES["llava_images"].component)
    model = checks.base_of(family)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        checks.attach(model, component, positions=spec)
    assert [name for name, _ in model.named_modules()] == before
