"""Which frozen weights a model has, in one short string."""

import hashlib
import json

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dive_fast.models.spec import text_config_of

# Numbers that a forward pass depends on and no weight holds.
_SETTINGS = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "rms_norm_eps",
    "layer_norm_eps",
    "norm_eps",
    "hidden_act",
    "hidden_activation",
    "sliding_window",
    "layer_types",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
)

SAMPLED_VALUES = 256
"""Values per weight tensor in a model's fingerprint: hashing 14 GB for every run would cost more than it saves."""


def model_fingerprint(model: nn.Module, *, any_dtype: bool = False) -> str:
    """sha256 over names, shapes, dtypes and evenly spaced values of the frozen parameters and buffers.

    Adapters inside the model are no part of it, so that it is the same with any of them and with none.

    Args:
        any_dtype: leave dtypes out and round values to bfloat16: the same weights in float32 and in bfloat16 have one
            fingerprint. float16 has its own, since it rounds otherwise.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_frozen_tensors(model).items()):
        flat = tensor.detach().reshape(-1)
        count = min(flat.numel(), SAMPLED_VALUES)
        index = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)
        values = flat[index]
        if any_dtype and values.is_floating_point():
            values = values.bfloat16()
        dtype = "" if any_dtype else f"{tensor.dtype} "
        digest.update(f"{name} {tuple(tensor.shape)} {dtype}".encode())
        digest.update(values.cpu().double().numpy().tobytes())
    return digest.hexdigest()


def forward_settings(model: nn.Module) -> dict:
    """What else the decoder's forward pass depends on, rope's settings among it, as JSON values."""
    if not hasattr(model, "config"):
        return {}
    config = text_config_of(model).to_dict()
    found = {name: config[name] for name in _SETTINGS if config.get(name) is not None}
    return json.loads(json.dumps(found, default=str))


def _frozen_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> tensor as the model has them without PEFT, which wraps a layer that it adapts or copies."""
    adapters = tuple(
        f"{name}.{group}."
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        for group in (*module.adapter_layer_names, *module.other_param_names)
    )
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(adapters) and ".modules_to_save." not in name
    }
