"""Random weights in the true shapes of named models, made where they are to be used: speed does not depend on values.

The configurations are those of the models' config.json on the Hugging Face hub, written down here, so that nothing is
fetched: mistralai/Mistral-7B-v0.3, Qwen/Qwen2.5-7B-Instruct and the text part of google/gemma-3-4b-it.
"""

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

# No token ends a row, whatever random weights come upon.
_ENDLESS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def _mistral_7b() -> MistralConfig:
    return MistralConfig(
        vocab_size=32768,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        sliding_window=None,
        tie_word_embeddings=False,
        **_ENDLESS,
    )


def _qwen2_5_7b() -> Qwen2Config:
    return Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        **_ENDLESS,
    )


def _gemma3_4b() -> Gemma3TextConfig:
    return Gemma3TextConfig(
        vocab_size=262208,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        sliding_window=1024,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        **_ENDLESS,
    )


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "mistral-7b": _mistral_7b,
    "qwen2.5-7b": _qwen2_5_7b,
    "gemma3-4b": _gemma3_4b,
}


def random_model(name: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The model of that name in `CONFIGS`, in eval mode, embeddings and head included."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype)
    return model.eval().requires_grad_(False)
