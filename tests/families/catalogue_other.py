"""Vision and audio models: single towers, dual encoders, encoder-decoder models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.families.family import (
    BART,
    SPECIAL,
    VOCAB,
    WIDTH,
    Batch,
    Family,
    add,
    decoder_tokens,
    generator,
    maker,
    padding_mask,
    paths,
    split,
    text,
    text_tokens,
    transformers_class,
    with_decoder_ids,
)


def shaped(key: str, *shape: int, padded: bool = False) -> Callable[[str, int], Batch | None]:
    """Batches of random numbers without padding."""

    def inputs(padding: str, batch: int) -> Batch | None:
        if padding == "left" or (padding == "none" and padded):
            return None
        return {key: torch.randn(batch, *shape, generator=generator())}

    return inputs


# ---- vision

VIT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}
CLASSES = {"initializer_range": 0.15, "num_labels": 3}


def vision(name: str, model: str, *at: str, size: int = 16, **keywords: Any) -> None:
    """Add an image model; the rows of its blocks are counted from their own shape."""
    family, settings = split(keywords)
    bare = model.removesuffix("ForImageClassification").removesuffix("Model")
    make = maker(model, f"{bare}Config", {**family.pop("base", {**VIT, **CLASSES}), **settings})
    common = {"kind": "vision", "inputs": shaped("pixel_values", 3, size, size), "count": 3}
    add(Family(name=name, make=make, blocks=paths(at), **{**common, **family}))


vision("vit", "ViTForImageClassification", "vit.layers", "vit.encoder.layer")
vision("deit", "DeiTForImageClassification", "deit.layers", "deit.encoder.layer")
vision(
    "beit",
    "BeitForImageClassification",
    "beit.layers",
    "beit.encoder.layer",
    use_relative_position_bias=True,
)
vision("dinov2", "Dinov2ForImageClassification", "dinov2.encoder.layer")
REGISTERS = "dinov2_with_registers.encoder.layer"
vision("dinov2_registers", "Dinov2WithRegistersForImageClassification", REGISTERS)
vision("dinov3_vit", "DINOv3ViTModel", "model.layer", "layer", num_register_tokens=2)
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 2, 1],
    "num_heads": [2, 2, 2],
    "window_size": 2,
    **CLASSES,
}
STAGES = {"base": SWIN, "note": "stages of growing width"}
vision("swin", "SwinForImageClassification", "swin.encoder.layers", **STAGES)
vision("swinv2", "Swinv2ForImageClassification", "swinv2.encoder.layers", **STAGES)
vision("vit_mae", "ViTMAEModel", "layers", "encoder.layer", mask_ratio=0.0)
vision("ijepa", "IJepaForImageClassification", "ijepa.layers", "ijepa.encoder.layer")
TOWER = {"base": {**VIT, "projection_dim": 16}}
TOWERS = ("encoder.layers", "vision_model.encoder.layers")
vision("clip_vision", "CLIPVisionModel", *TOWERS, **TOWER)
vision("siglip_vision", "SiglipVisionModel", *TOWERS, base=VIT)
IMAGES = {"size": 32, "refused": "[B, C, H, W]"}
CONV = {"hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "num_stages": 3, "image_size": 32}
vision("convnext", "ConvNextForImageClassification", "", base=CONV, **IMAGES)
vision("convnextv2", "ConvNextV2ForImageClassification", "", base=CONV, **IMAGES)
DINO = {"hidden_sizes": [32, 32, 32, 32], "depths": [1, 1, 1, 1], "image_size": 32}
vision("dinov3_convnext", "DINOv3ConvNextModel", "", base=DINO, **IMAGES)
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
vision("resnet", "ResNetForImageClassification", "", base=RESNET, **IMAGES)
SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "hidden_sizes": [16, 32],
    "sr_ratios": [2, 1],
    "num_attention_heads": [2, 2],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16,
}
vision(
    "segformer", "SegformerForImageClassification", "", base=SEGFORMER, size=32, refused="egformer"
)


# ---- two towers of different widths: text by role, images by path


def dual(name: str, prefix: str, words: dict[str, Any], **more: Any) -> None:
    """Add a model with a text and a vision tower, once for each tower."""
    small = {**VIT, "hidden_size": 24, "intermediate_size": 48, "projection_dim": 16}

    def make() -> nn.Module:
        config = transformers_class(f"{prefix}Config")(
            text_config=words, vision_config=small, **more
        )
        return transformers_class(f"{prefix}Model")(config)

    def inputs(padding: str, batch: int) -> Batch:
        return {**text(padding, batch), **shaped("pixel_values", 3, 16, 16)("none", batch)}

    common = {"kind": "vision-language", "make": make, "inputs": inputs, "count": 3}
    note = "the images' tower by its path"
    at = ("text_model.encoder.layers", "vision_model.encoder.layers")
    add(Family(name=name, blocks=paths(at[0]), tokens=text_tokens, **common))
    add(
        Family(
            name=f"{name}_images",
            blocks=paths(at[1]),
            component=f"{at[1]}.{{layer}}",
            note=note,
            **common,
        )
    )


WORDS = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "projection_dim": 16,
    **SPECIAL,
}
dual("clip", "CLIP", WORDS, projection_dim=16)
dual("siglip", "Siglip", {**WORDS, "projection_size": 24, "hidden_size": 24})


def _vilt_inputs(padding: str, batch: int) -> Batch | None:
    images = shaped("pixel_values", 3, 16, 16)(padding, batch)
    return images and {**text(padding, batch), **images}


add(
    Family(
        name="vilt",
        kind="vision-language",
        make=maker(
            "ViltForQuestionAnswering",
            "ViltConfig",
            {**VIT, **CLASSES, "vocab_size": VOCAB, "max_image_length": -1},
        ),
        inputs=_vilt_inputs,
        blocks=paths("vilt.encoder.layer"),
        count=3,
        refused="vilt",
    )
)


# ---- audio

KERNELS, STRIDES, SAMPLES = (10, 4, 4), (5, 4, 4), 4000
WAVES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16, 16, 16),
    "conv_stride": STRIDES,
    "conv_kernel": KERNELS,
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 20,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "feat_extract_norm": "layer",
    "classifier_proj_size": 16,
    **CLASSES,
}


def waves(padding: str, batch: int) -> Batch | None:
    """Waveforms of different lengths."""
    if padding == "left":
        return None
    wave = torch.randn(batch, SAMPLES, generator=generator())
    if padding == "none":
        return {"input_values": wave}
    mask = padding_mask([SAMPLES, SAMPLES // 2, SAMPLES // 3][:batch], padding, SAMPLES)
    return {"input_values": wave * mask, "attention_mask": mask}


def frames(batch: Batch) -> Tensor | None:
    """Mask of the frames computed from real samples only, bool ``[B, T]``."""
    mask = batch.get("attention_mask")
    if mask is None:
        return None
    lengths, width = mask.sum(1), mask.shape[1]
    for kernel, stride in zip(KERNELS, STRIDES, strict=True):
        lengths, width = (lengths - kernel) // stride + 1, (width - kernel) // stride + 1
    return torch.arange(width)[None] < lengths[:, None]


def audio(name: str, prefix: str, at: str, **settings: Any) -> None:
    """Add an audio model that takes waveforms."""
    make = maker(f"{prefix}ForSequenceClassification", f"{prefix}Config", {**WAVES, **settings})
    where = {"inputs": waves, "blocks": paths(at), "count": 3, "tokens": frames}
    add(Family(name=name, kind="audio", make=make, **where))


audio("wav2vec2", "Wav2Vec2", "wav2vec2.encoder.layers")
audio("wav2vec2_stable", "Wav2Vec2", "wav2vec2.encoder.layers", do_stable_layer_norm=True)
audio("hubert", "Hubert", "hubert.encoder.layers")
audio("wavlm", "WavLM", "wavlm.encoder.layers")


def featured(
    name: str,
    make: Callable[[], nn.Module],
    inputs: Callable[[str, int], Batch | None],
    at: str | tuple[str, ...],
    dec: str = "",
    **more: Any,
) -> None:
    """Add an encoder-decoder model whose encoder takes features, and its decoder."""
    common = {"kind": "encoder-decoder", "make": make, "count": 2, **more}
    common["inputs"] = lambda padding, batch: with_decoder_ids(inputs(padding, batch))
    add(Family(name=name, blocks=paths(at), generates=True, **common))
    if dec:
        side = {"tokens": decoder_tokens, "component": "decoder.block_output", "labels": "decoder"}
        add(Family(name=f"{name}_decoder", blocks=paths(dec), **{**common, **side}))


SPEECH = {**BART, "max_target_positions": 32}
WHISPER = {
    **SPEECH,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
MEL = shaped("input_features", 8, 40, padded=True)
featured(
    "whisper",
    maker("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
    MEL,
    "model.encoder.layers",
    "model.decoder.layers",
)
add(
    Family(
        name="whisper_classifier",
        kind="audio",
        make=maker("WhisperForAudioClassification", "WhisperConfig", {**WHISPER, "num_labels": 3}),
        inputs=MEL,
        blocks=paths("encoder.layers"),
        count=2,
    )
)
S2T = {
    **SPEECH,
    "max_source_positions": 64,
    "input_feat_per_channel": 8,
    "input_channels": 1,
    "conv_channels": 16,
    "conv_kernel_sizes": (3, 3),
    "num_conv_layers": 2,
}
featured(
    "speech_to_text",
    maker("Speech2TextForConditionalGeneration", "Speech2TextConfig", S2T),
    shaped("input_features", 40, 8, padded=True),
    "model.encoder.layers",
)
MOONSHINE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "encoder_num_hidden_layers": 2,
    "decoder_num_hidden_layers": 2,
    "encoder_num_attention_heads": 4,
    "decoder_num_attention_heads": 4,
    "encoder_num_key_value_heads": 4,
    "decoder_num_key_value_heads": 4,
    "decoder_start_token_id": 2,
    **SPECIAL,
}
featured(
    "moonshine",
    maker("MoonshineForConditionalGeneration", "MoonshineConfig", MOONSHINE),
    shaped("input_values", 2000, padded=True),
    "model.encoder.layers",
)
AST = {**VIT, **CLASSES, "frequency_stride": 4, "time_stride": 4, "max_length": 16}
del AST["image_size"]
add(
    Family(
        name="ast",
        kind="audio",
        make=maker("ASTForAudioClassification", "ASTConfig", {**AST, "num_mel_bins": 8}),
        inputs=shaped("input_values", 16, 8, padded=True),
        blocks=paths(
            ("audio_spectrogram_transformer.layers", "audio_spectrogram_transformer.encoder.layer")
        ),
        count=3,
    )
)


# ---- an image encoder and a text decoder of different widths


def _captions(config: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        small = {**VIT, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 48}
        enc, dec = (
            transformers_class("ViTConfig")(**small, initializer_range=0.15),
            transformers_class(config)(**settings),
        )
        both = transformers_class("VisionEncoderDecoderConfig").from_encoder_decoder_configs(
            enc, dec
        )
        both.decoder_start_token_id, both.pad_token_id = 2, 0
        model = transformers_class("VisionEncoderDecoderModel")(both)
        model.generation_config.decoder_start_token_id = 2
        return model

    return make


GPT = {
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    **SPECIAL,
}
GPT |= {"add_cross_attention": True, "initializer_range": 0.15}
TROCR = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "cross_attention_hidden_size": 24,
    "decoder_start_token_id": 2,
    "init_std": 0.15,
    **SPECIAL,
}
PIXELS = shaped("pixel_values", 3, 16, 16, padded=True)
for _name, _config, _settings, _dec in (
    ("vision_encoder_decoder", "GPT2Config", GPT, "decoder.transformer.h"),
    ("trocr", "TrOCRConfig", TROCR, "decoder.model.decoder.layers"),
):
    featured(
        _name,
        _captions(_config, _settings),
        PIXELS,
        ("encoder.layers", "encoder.encoder.layer"),
        _dec,
    )
