"""Checkpoint folders as LLaVA's own code writes them: its key names and settings, random weights, invented words.

The names are those of llava/model/llava_arch.py and language_model/llava_{mistral,qwen2}.py (haotian-liu/LLaVA,
microsoft/LLaVA-Med, FreedomIntelligence/HuatuoGPT-Vision), the settings those that llava/train/train.py leaves in
config.json.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dive_fast.models.tiny import tiny_tokenizer
from tests.tiny_processors import IMAGE_SIZE, randomize, text_sizes, vision_sizes

MISTRAL, QWEN = "llava_mistral", "llava_qwen2"
VISION = "model.vision_tower.vision_tower.vision_model."


def sentencepiece_tokenizer(scheme: str = "prepend"):
    """Letters, bytes and the mark of a space, as Mistral's; `scheme`: which texts get a space in front of them.

    "prepend" puts one behind every special token (Llama's older tokenizers), "first" at a text's beginning only.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581"]
    pieces += [chr(c) for c in range(0x21, 0x7F)]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    if scheme == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in pieces[:3]])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        # Mistral's own, which knows no images: it must not be taken.
        chat_template="{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}",
    )


def qwen_tokenizer():
    tokenizer = tiny_tokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>", chat_template=tokenizer.chat_template
    )


def reference(kind: str, tokenizer, spare: int = 0, **vision) -> LlavaForConditionalGeneration:
    """A random model without a row for images; `spare` rows of the head that no token has."""
    sizes = text_sizes(tokenizer, vocab_size=len(tokenizer) + spare)
    text = (MistralConfig if kind == MISTRAL else Qwen2Config)(**sizes)
    config = LlavaConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(**vision_sizes(num_hidden_layers=3), **vision),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_token_index=0,
        tie_word_embeddings=False,
    )
    return randomize(LlavaForConditionalGeneration(config))


def original_weights(model, tower: bool = True) -> dict[str, torch.Tensor]:
    """The model's weights under the names of LLaVA's code."""
    renamed = {}
    for key, tensor in model.state_dict().items():
        if key.startswith("model.vision_tower."):
            rest = key.removeprefix("model.vision_tower.").removeprefix("vision_model.")
            key = VISION + rest if tower else None
        elif key.startswith("model.language_model."):
            key = "model." + key.removeprefix("model.language_model.")
        elif key.startswith("model.multi_modal_projector."):
            layer, kind = key.removeprefix("model.multi_modal_projector.").split(".")
            key = f"model.mm_projector.{ {'linear_1': 0, 'linear_2': 2}[layer] }.{kind}"
        if key is not None:
            renamed[key] = tensor.clone()
    return renamed


def original_config(kind: str, model, tower: str) -> dict:
    """config.json as LLaVA's training leaves it."""
    text = model.config.text_config
    return {
        "architectures": ["LlavaMistralForCausalLM" if kind == MISTRAL else "LlavaQwen2ForCausalLM"],
        "model_type": kind,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_parameters["rope_theta"],
        "sliding_window": text.sliding_window,
        "tie_word_embeddings": False,
        "vocab_size": text.vocab_size,
        "use_cache": True,
        "torch_dtype": "float32",
        "transformers_version": "4.36.2",
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 16,
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": tower,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
    }


def write_tower(folder: Path, model=None, config=None) -> None:
    """A CLIP folder; with a model, its vision tower's weights too."""
    folder.mkdir(parents=True)
    (config or model.config.vision_config).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ).save_pretrained(folder)
    if model is not None:
        tower = CLIPVisionModel(model.config.vision_config)
        tower.load_state_dict(model.model.vision_tower.state_dict())
        tower.save_pretrained(folder)


def write_weights(folder: Path, weights: dict, form: str) -> None:
    """`form`: "safetensors" or "bin", with "-sharded" behind it for two files and an index."""
    suffix = ".safetensors" if form.startswith("safetensors") else ".bin"
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    keys, parts = sorted(weights), {f"{stem}{suffix}": list(weights)}
    if form.endswith("-sharded"):
        middle = len(keys) // 2
        parts = {f"{stem}-0000{i}-of-00002{suffix}": half for i, half in ((1, keys[:middle]), (2, keys[middle:]))}
        index = {"metadata": {}, "weight_map": {key: file for file, half in parts.items() for key in half}}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    for file, own in parts.items():
        part = {key: weights[key] for key in own}
        save_file(part, folder / file) if suffix == ".safetensors" else torch.save(part, folder / file)


def write_original(
    folder: Path, kind: str = MISTRAL, *, form: str = "safetensors", tower: bool = True, spare: int = 0,
    tokenizer=None, dtype=torch.float32, change=None, **settings,
):  # fmt: skip
    """Write a checkpoint into `folder` and return (the same model, built directly; its tokenizer).

    Args:
        tower: the checkpoint holds the vision tower's weights; else its own folder does.
        change: called with the weights, to spoil them.
        settings: of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or (sentencepiece_tokenizer() if kind == MISTRAL else qwen_tokenizer())
    model = reference(kind, tokenizer, spare).to(dtype)
    write_tower(folder / "vit" / "clip", None if tower else model, model.config.vision_config)
    config = original_config(kind, model, "./vit/clip") | {"torch_dtype": str(dtype).removeprefix("torch.")} | settings
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    weights = original_weights(model, tower)
    if change is not None:
        change(weights)
    write_weights(folder, weights, form)
    return model, tokenizer
