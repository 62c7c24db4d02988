"""How a model turns its decoder's final states into logits, for losses that never make all of them.

N tokens, D hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from dive_fast.errors import InputError
from dive_fast.models.hidden import hidden_states
from dive_fast.models.modes import evaluating
from dive_fast.models.spec import spec_of, text_config_of

# Names of the factor that some families put on their logits, and whether they divide by it.
_SCALES = {"logit_scale": False, "logits_scaling": True, "lm_head_multiplier": False}  # Cohere, Granite, Falcon-H1


@dataclass(frozen=True)
class Head:
    """The frozen head: logits = cap(scale * (h W' + b)), where cap(x) = c * tanh(x / c) with a softcap c (Gemma 2).

    Attributes:
        linear: the module with W [V, D] and b [V] or None.
        scale: on the logits (Cohere, Granite), 1 elsewhere.
    """

    linear: nn.Module
    softcap: float | None = None
    scale: float = 1.0

    @property
    def weight(self) -> torch.Tensor:
        return self.linear.weight

    @property
    def options(self) -> dict:
        """Arguments of `dive_fast.ops.linear_cross_entropy` for states that went through `inputs`."""
        bias = getattr(self.linear, "bias", None)
        return {"bias": bias if bias is None or self.scale == 1.0 else bias * self.scale, "softcap": self.softcap}

    def inputs(self, final: torch.Tensor) -> torch.Tensor:
        """Final states [..., D] with the scale on them, so that W alone makes logits of them."""
        return final if self.scale == 1.0 else final * self.scale

    def logits(self, final: torch.Tensor) -> torch.Tensor:
        """[..., V] in float32, as the loss sees them."""
        options = self.options
        logits = nn.functional.linear(self.inputs(final), self.weight).float()
        logits = logits if options["bias"] is None else logits + options["bias"].float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_of(model: PreTrainedModel) -> Head:
    """The head of a transformers model.

    Raises:
        InputError: it has none with a matrix.
    """
    linear = model.get_output_embeddings()
    if not hasattr(linear, "weight"):
        raise InputError(f"model: {type(model).__name__} has no output embedding matrix (lm_head)")
    config = text_config_of(model)
    scale = 1.0
    for name, divides in _SCALES.items():
        value = getattr(config, name, None)
        if value is not None:
            scale *= 1 / value if divides else value
    return Head(linear, getattr(config, "final_logit_softcapping", None), scale)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compare the logits of two tokens with the model's own, in families that no `DecoderSpec` describes.

    Raises:
        InputError: the family does something else to its logits; a loss computed here would be another model's.
    """
    if spec_of(model) is not None or any(parameter.is_meta for parameter in model.parameters()):
        return
    with evaluating(model):
        tokens = torch.tensor([[0, 1]], device=model.get_input_embeddings().weight.device)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        own = model(**inputs, use_cache=False).logits.float()
        ours = head_of(model).logits(hidden_states(model, inputs).final).to(own.device)
    # Rounded to the model's dtype, by both; a factor or a cap that is missing changes logits by far more.
    if (own - ours).abs().max() > 0.02 * own.abs().max():
        raise InputError(
            f"model: {text_config_of(model).model_type} does something to its logits behind the head that is not known "
            "here (dive_fast/models/head.py), so that losses and perplexities would be another model's"
        )
