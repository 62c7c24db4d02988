"""Where things live in a decoder: one line of data per model family, no patches.

A vision-language model is a vision tower, a projector and a *decoder*: a stack of layers with a residual stream.
`transformers` finds the decoder (`get_decoder()`); what the layers call their parts is written down here.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from dive_fast.errors import InputError


@dataclass(frozen=True)
class DecoderSpec:
    """Names of a decoder layer's parts.

    Attributes:
        input_norm: the norm whose input is the residual stream at the layer's start.
        attention: the self-attention module.
        attention_output: the module whose output is added to the residual stream after attention: the attention
            itself in pre-norm decoders, the norm behind it in Gemma's sandwich.
        mlp_norm, mlp, mlp_output: the same for the MLP.
    """

    input_norm: str = "input_layernorm"
    attention: str = "self_attn"
    attention_output: str = "self_attn"
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    mlp_output: str = "mlp"


_PRE_NORM = DecoderSpec()
_SANDWICH_NORM = DecoderSpec(
    attention_output="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_output="post_feedforward_layernorm",
)

DECODER_SPECS: dict[str, DecoderSpec] = {
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "qwen2_5_vl_text": _PRE_NORM,
    "qwen3_vl_text": _PRE_NORM,
    "gemma3_text": _SANDWICH_NORM,
}
"""Text `model_type` -> spec. A family outside the table can be steered at `site="block"`, which needs no names."""


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module that holds the decoder layers as `layers`: a language model's own, or the text part of a larger one.

    Raises:
        InputError: `model` has no decoder with a list of layers.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise InputError(
            f"model: {type(model).__name__} has no decoder with a list of layers that get_decoder() finds; "
            "steering needs a causal language model or a vision-language model around one"
        )
    return decoder


def text_config_of(model: PreTrainedModel):
    """The configuration of the decoder: hidden_size, num_hidden_layers, vocab_size, model_type."""
    return model.config.get_text_config(decoder=True)


def spec_of(model: PreTrainedModel) -> DecoderSpec | None:
    """The family's `DecoderSpec`, or None where the family is not in the table."""
    return DECODER_SPECS.get(text_config_of(model).model_type)
