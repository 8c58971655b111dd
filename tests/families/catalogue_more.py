"""More image, video and audio towers, and less common encoder-decoder models."""

from __future__ import annotations

from typing import Any

from tests.families.catalogue_encoders import pair
from tests.families.catalogue_other import CLASSES, TOWERS, VIT, WAVES, audio, shaped, vision
from tests.families.catalogue_vlm import IMAGE, SIXTEEN, mixed, seeing
from tests.families.family import BART, VOCAB, WIDTH, Family, add, maker, paths, with_decoder_ids

# ---- images
BARE = {"base": VIT}
vision("vit_msn", "ViTMSNForImageClassification", "vit.layers", "vit.encoder.layer")
vision(
    "data2vec_vision",
    "Data2VecVisionForImageClassification",
    "data2vec_vision.layers",
    "data2vec_vision.encoder.layer",
    use_relative_position_bias=True,
)
vision("aimv2_vision", "Aimv2VisionModel", "encoder.layers", **BARE)
vision("chinese_clip_vision", "ChineseCLIPVisionModel", *TOWERS, **BARE)
vision("mlcd_vision", "MLCDVisionModel", *TOWERS, **BARE)
vision("dpt", "DPTModel", "layers", "encoder.layer", readout_type="ignore", **BARE)
vision("pixio", "PixioModel", "layers", "encoder.layer", **BARE)
vision("tipsv2_vision", "Tipsv2VisionModel", "encoder.layer", **BARE)
vision("sapiens2", "Sapiens2Model", "model.layer", **BARE)
vision("yolos", "YolosModel", "layers", "encoder.layer", base={**VIT, "image_size": [16, 16]})
GRID = {"base": VIT, "refused": "grid"}
vision("vitdet", "VitDetModel", "encoder.layer", **GRID)
HIERA = {"image_size": [16, 16], "patch_size": [3, 3], "patch_stride": [2, 2], "embed_dim": 16}
HIERA |= {"patch_padding": [1, 1], "depths": [1, 1], "num_heads": [2, 4], "query_stride": [2, 2]}
HIERA |= {"masked_unit_size": [2, 2], "num_query_pool": 1}
vision("hiera", "HieraForImageClassification", "", base=HIERA, refused="hiera")
DONUT = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 2, 1]}
DONUT |= {"num_heads": [2, 2, 2], "window_size": 2, **CLASSES}
vision("donut_swin", "DonutSwinForImageClassification", "donut.encoder.layers", base=DONUT)
MAPS = {"size": 32, "refused": "[B, C, H, W]"}
FOCAL = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1]}
FOCAL |= {"hidden_sizes": [16, 32], "focal_levels": [2, 2], "focal_windows": [3, 3]}
vision(
    "focalnet",
    "FocalNetForImageClassification",
    "focalnet.encoder.stages",
    base={**FOCAL, **CLASSES},
    size=32,
    count=2,
    refused="convolutional",
)
SMALL = {"depths": [1, 1], "embedding_size": 16, "hidden_sizes": [16, 32], "groups_width": 8}
vision("regnet", "RegNetForImageClassification", "", base=SMALL, **MAPS)
vision("poolformer", "PoolFormerForImageClassification", "", base={}, **MAPS)
vision("mobilenet_v2", "MobileNetV2ForImageClassification", "", base={}, **MAPS)
vision("swiftformer", "SwiftFormerForImageClassification", "", base={}, **MAPS)
vision("textnet", "TextNetForImageClassification", "", base={}, **MAPS)

# ---- videos
FRAMES = shaped("pixel_values", 2, 3, 16, 16)
VIDEO = {"inputs": FRAMES, "num_frames": 2}
vision("videomae", "VideoMAEModel", "layers", "encoder.layer", **BARE, **VIDEO)
vision("vivit", "VivitModel", "layers", "encoder.layer", tubelet_size=[2, 4, 4], **BARE, **VIDEO)
vision("timesformer", "TimesformerModel", "layers", "encoder.layer", **BARE, **VIDEO)

# ---- audio
audio("data2vec_audio", "Data2VecAudio", "data2vec_audio.encoder.layers")
audio("unispeech", "UniSpeech", "unispeech.encoder.layers", num_codevectors_per_group=8)
audio("unispeech_sat", "UniSpeechSat", "unispeech_sat.encoder.layers")
audio("sew", "SEW", "sew.encoder.layers", squeeze_factor=1)
audio("sew_d", "SEWD", "sew_d.encoder.encoder.layer", squeeze_factor=1)
audio(
    "wav2vec2_conformer",
    "Wav2Vec2Conformer",
    "wav2vec2_conformer.encoder.layers",
    conv_depthwise_kernel_size=3,
)
BERT = {**WAVES, "feature_projection_input_dim": 8, "conv_depthwise_kernel_size": 3}
add(
    Family(
        name="wav2vec2_bert",
        kind="audio",
        make=maker("Wav2Vec2BertForSequenceClassification", "Wav2Vec2BertConfig", BERT),
        inputs=shaped("input_features", 16, 8),
        blocks=paths("wav2vec2_bert.encoder.layers"),
        count=3,
    )
)
PARAKEET = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_mel_bins": 8,
    "subsampling_factor": 2,
    "subsampling_conv_channels": 8,
    "conv_kernel_size": 3,
    "initializer_range": 0.15,
}
for _name, _model in (("parakeet_encoder", "ParakeetEncoder"), ("lasr_encoder", "LasrEncoder")):
    add(
        Family(
            name=_name,
            kind="audio",
            make=maker(_model, f"{_model}Config", PARAKEET),
            inputs=shaped("input_features", 32, 8),
            blocks=paths("layers"),
            count=3,
        )
    )
MEL = {
    "d_model": WIDTH,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "init_std": 0.15,
}
MEL |= {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
for _name, _model in (
    ("voxtral_encoder", "VoxtralEncoder"),
    ("qwen2_audio_encoder", "Qwen2AudioEncoder"),
):
    add(
        Family(
            name=_name,
            kind="audio",
            make=maker(_model, f"{_model}Config", MEL),
            inputs=shaped("input_features", 8, 40),
            blocks=paths("layers"),
            count=2,
        )
    )

# ---- text to text
SIDES = ("model.encoder.layers", "model.decoder.layers")
pair("blenderbot_small", "BlenderbotSmallForConditionalGeneration", *SIDES)
pair("mvp", "MvpForConditionalGeneration", *SIDES)
pair(
    "fsmt",
    "FSMTForConditionalGeneration",
    *SIDES,
    src_vocab_size=VOCAB,
    tgt_vocab_size=VOCAB,
    vocab_size=...,
    use_cache=False,
    layout="tbd",
    note="time stands first",
)
SEAMLESS: dict[str, Any] = {
    **BART,
    "hidden_size": WIDTH,
    "t2u_vocab_size": 20,
    "t2u_encoder_layers": 1,
    "t2u_decoder_layers": 1,
    "t2u_encoder_attention_heads": 4,
    "t2u_decoder_attention_heads": 4,
    "t2u_encoder_ffn_dim": 32,
    "t2u_decoder_ffn_dim": 32,
    "speech_encoder_layers": 1,
    "speech_encoder_attention_heads": 4,
    "speech_encoder_intermediate_size": 32,
    "initializer_range": 0.15,
    "d_model": ...,
}
TEXTS = ("text_encoder.layers", "text_decoder.layers")
for _name, _bare in (("seamless_m4t", "SeamlessM4T"), ("seamless_m4t_v2", "SeamlessM4Tv2")):
    pair(_name, maker(f"{_bare}ForTextToText", f"{_bare}Config", SEAMLESS), *TEXTS)

# ---- images to text
DAVIT = {
    "depths": [1, 1],
    "patch_size": [7, 3],
    "patch_stride": [4, 2],
    "patch_padding": [3, 1],
    "patch_prenorm": [False, True],
    "embed_dim": [16, 32],
    "num_heads": [2, 4],
    "num_groups": [2, 4],
    "window_size": 2,
    "projection_dim": WIDTH,
    "drop_path_rate": 0.0,
}
FLORENCE = {
    "text_config": ("BartConfig", {**BART, "vocab_size": VOCAB}),
    "vision_config": (None, DAVIT),
    "image_token_id": IMAGE,
}
seeing(
    "florence2",
    "Florence2",
    5,
    SIXTEEN,
    kind="encoder-decoder",
    count=2,
    at="model.language_model.encoder.layers",
    inputs=lambda padding, batch: with_decoder_ids(mixed(5, SIXTEEN)(padding, batch)),
    labels="",
    scores_tokens=False,
    **FLORENCE,
)
seeing(
    "florence2_images",
    "Florence2",
    5,
    SIXTEEN,
    kind="encoder-decoder",
    count=2,
    at="model.vision_tower.convs",
    component="model.vision_tower.convs.{layer}",
    inputs=lambda padding, batch: with_decoder_ids(mixed(5, SIXTEEN)(padding, batch)),
    labels="",
    scores_tokens=False,
    refused="[B, C, H, W]",
    **FLORENCE,
)
