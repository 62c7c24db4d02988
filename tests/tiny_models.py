"""Tiny random models of every supported family, and inputs for them."""

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    Idefics3Config,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3VLConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)

VOCAB = 64
IMAGE_TOKEN = 60
IMAGE_LENGTH = 4
"""Tokens of one image, in every family."""
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _vision(size=16, patch=8):
    return {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": size,
        "patch_size": patch,
    }


def _llama():
    return LlamaConfig(**_SIZES, tie_word_embeddings=True)


def _llava():
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**_vision()),
        text_config=_llama(),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )


def _qwen2_5_vl():
    text = {**_SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 8,
        "fullatt_block_indexes": [0],
        "window_size": 16,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        vision_start_token_id=61,
        vision_end_token_id=62,
    )


def _qwen3_vl():
    text = {**_SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 8,
        "num_position_embeddings": 16,
        # Features of both vision layers are added behind the first two decoder layers.
        "deepstack_visual_indexes": [0, 1],
    }
    return Qwen3VLConfig(
        text_config={**text, "head_dim": 8},
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        vision_start_token_id=61,
        vision_end_token_id=62,
    )


def _idefics(cls):
    return cls(
        text_config=LlamaConfig(**_SIZES),
        vision_config=_vision(size=16, patch=4),
        scale_factor=2,
        image_token_id=IMAGE_TOKEN,
        pad_token_id=0,
    )


def _gemma3_text():
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3TextConfig(**_SIZES, head_dim=8, sliding_window=6, layer_types=layer_types)


def _gemma3_vl():
    return Gemma3Config(
        text_config=_gemma3_text(),
        vision_config=SiglipVisionConfig(**_vision(size=16, patch=4)),
        mm_tokens_per_image=IMAGE_LENGTH,
        image_token_index=IMAGE_TOKEN,
    )


FAMILIES = {
    "llama": _llama,
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=6),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=8),
    "gemma3": _gemma3_text,
    "llava": _llava,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "idefics3": lambda: _idefics(Idefics3Config),
    "smolvlm": lambda: _idefics(SmolVLMConfig),
    "gemma3_vl": _gemma3_vl,
}
VISION_FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "gemma3_vl")


def tiny_model(family: str, dtype=torch.float32, seed: int = 0):
    """A random model of `family` in eval mode; weights wide enough that positions and layers matter."""
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    auto = AutoModelForImageTextToText if family in VISION_FAMILIES else AutoModelForCausalLM
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


def text_batch(rows: int = 3, length: int = 9, left_padding=(0, 2, 4), seed: int = 1):
    """input_ids and attention_mask [rows, length] with the given left padding per row."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, 60, (rows, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row, pad in enumerate(left_padding[:rows]):
        input_ids[row, :pad] = 0
        attention_mask[row, :pad] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def image_inputs(family: str, input_ids: torch.Tensor, seed: int = 3) -> dict:
    """What the processor of `family` gives beside ids that hold one image (IMAGE_LENGTH image tokens) a row."""
    generator = torch.Generator().manual_seed(seed)
    rows, is_image = len(input_ids), (input_ids == IMAGE_TOKEN).long()
    shape = {
        "llava": (rows, 3, 16, 16),
        "gemma3_vl": (rows, 3, 16, 16),
        "qwen2_5_vl": (rows * 16, 3 * 2 * 8 * 8),
        "qwen3_vl": (rows * 16, 3 * 2 * 8 * 8),
        "idefics3": (rows, 1, 3, 16, 16),
        "smolvlm": (rows, 1, 3, 16, 16),
    }[family]
    inputs = {"pixel_values": torch.randn(shape, generator=generator)}
    if family in ("qwen2_5_vl", "qwen3_vl"):
        inputs |= {"image_grid_thw": torch.tensor([[1, 4, 4]] * rows), "mm_token_type_ids": is_image}
    elif family == "gemma3_vl":
        inputs["token_type_ids"] = is_image
    return inputs


def randomize_adapters(model, scale: float = 0.3, seed: int = 2):
    """Give every adapter parameter a value that makes its push matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "dive_" in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model
