"""All families of the catalogue, compared with plain hooks; without ``-m full``, a selection."""

from __future__ import annotations

import pytest

from tests.families import checks
from tests.families.catalogue import FAMILIES

QUICK = ("places", "rows", "gradients", "generate")

# only with -m full: slow families, and those whose structure another family also has
_RARE = """
ministral gemma vaultgemma falcon_new falcon_alibi gptj codegen openai_gpt gpt_neox_japanese
opt_projected olmo olmo3 stablelm cohere glm granite nemotron persimmon smollm3 exaone4 ernie4_5
helium arcee apertus seed_oss bitnet diffllama hunyuan_dense xglm biogpt roberta_decoder olmoe
flex_olmo deepseek_v2 deepseek_v4 glm4_moe dots1 ernie4_5_moe hunyuan_moe jetmoe minimax_m2
qwen3_5_moe_text kimi_linear falcon_mamba lfm2_moe zamba bert_mlm xlm_roberta xlm_roberta_xl
camembert deberta deberta_v2_conv modernbert_mlm jina_v3 rembert roformer ibert layoutlm ernie
megatron_bert mt5 mt5_decoder umt5 umt5_decoder longt5 mbart mbart_decoder pegasus pegasus_decoder
marian_decoder blenderbot m2m_100 plbart pegasus_x bigbird_pegasus prophetnet t5gemma_decoder deit
dinov2_registers swinv2 ijepa convnextv2 siglip siglip_images wav2vec2_stable hubert
speech_to_text vision_encoder_decoder_decoder vipllava llava_onevision qwen2_5_vl smolvlm
internvl_wide mistral3 aya_vision idefics2 fuyu_text
"""
RARE = _RARE.split()


def test_the_rare_families_are_in_the_catalogue():
    assert set(RARE) <= set(FAMILIES)
    assert len(RARE) == len(set(RARE))


def pairs() -> list:
    """(family, check), ordered by family so that each base model is created once."""
    params = []
    for name, family in FAMILIES.items():
        for check in checks.checks_of(family):
            quick = name not in RARE and check in (*QUICK, "refused")
            marks = () if quick else pytest.mark.full
            params.append(pytest.param(name, check, marks=marks, id=f"{name}-{check}"))
    return params


@pytest.mark.parametrize(("name", "check"), pairs())
def test_a_family_agrees_with_plain_hooks(name, check):
    try:
        checks.run(FAMILIES[name], check)
    except checks.MissingClass as error:
        pytest.skip(str(error))
    except checks.BaseFails as error:
        pytest.skip(f"the base model itself fails: {error}")
