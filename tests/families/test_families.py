"""All families of the catalogue, compared with plain hooks; without ``-m full``, a selection."""

from __future__ import annotations

import pytest

from tests.families import checks
from tests.families.catalogue import FAMILIES

QUICK = ("places", "rows", "gradients", "generate", "checkpointing")

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
data2vec_text_mlm roberta_prelayernorm_mlm roc_bert_mlm mra yoso tapas gte ultrabert esmc splinter
openai_privacy_filter embedding_gemma2_text bros neomme clip_text dpr markuplm vit_msn
data2vec_vision aimv2_vision chinese_clip_vision mlcd_vision dpt pixio tipsv2_vision sapiens2
yolos donut_swin videomae timesformer data2vec_audio unispeech unispeech_sat sew sew_d
wav2vec2_bert lasr_encoder voxtral_encoder qwen2_audio_encoder blenderbot_small
blenderbot_small_decoder mvp mvp_decoder seamless_m4t_decoder seamless_m4t_v2
seamless_m4t_v2_decoder beam cwm flint granite_swa hyperclovax jais2 lfm3 ministral3 youtu
gemma4_unified_text data2vec_text roberta_prelayernorm bert_generation roc_bert moshi_text afmoe
aria_text cohere2_moe exaone_moe granitemoe_swa granitemoeshared hy_v3 inkling2_text kolibri1
mellum mimo_v2_flash minimax_m3_text solar_open axk1 axk2 glm4_moe_lite glm_moe_dsa
dots3_note_text cohere_compass_text
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
            quick = quick or (name, check) == ("gpt2", "compile")  # its graph breaks
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
