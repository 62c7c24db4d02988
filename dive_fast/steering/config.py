"""What a steering adapter is: its kind, its rank, where it sits and which positions it steers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftConfig, TaskType
from peft.utils.peft_types import PeftType

from dive_fast.errors import InputError


@dataclass(frozen=True)
class Kind:
    """The defaults that make a kind what its source describes, and whether it has a rank."""

    activation: str
    normalize_input: bool
    preserve_norm: bool
    alpha: float
    has_rank: bool = False


KINDS: dict[str, Kind] = {
    "lowrank": Kind("silu", normalize_input=True, preserve_norm=False, alpha=1.0, has_rank=True),
    "fixed": Kind("identity", normalize_input=False, preserve_norm=True, alpha=0.1),
    "gated": Kind("identity", normalize_input=False, preserve_norm=False, alpha=1.0),
    "reft": Kind("identity", normalize_input=False, preserve_norm=False, alpha=1.0, has_rank=True),
    "heads": Kind("identity", normalize_input=False, preserve_norm=False, alpha=1.0),
}
ACTIVATIONS = ("silu", "identity", "relu", "gelu", "tanh")
SITES = ("block", "attention")
SCOPES = ("response", "prompt", "all")


@dataclass
class DiveConfig(PeftConfig):
    """Configuration of a steering adapter; give it to `peft.get_peft_model`.

    The hidden state `h` at a steered site and position becomes

        n  = h / rms(h)          if normalize_input else h
        d  = alpha * gate(h) * (phi(n @ down.T + bias) @ up.T + static)
        h' = h + d,  rescaled to |h| if preserve_norm

    `None` for `activation`, `normalize_input`, `preserve_norm` and `alpha` means: what the kind's source does; the
    resolved value is stored with the adapter. A fresh `lowrank`, `gated` or `reft` adapter changes nothing, to the bit.

    Args:
        kind: "lowrank" (hidden-state-dependent bottleneck, the default), "fixed" (one learned vector per layer with a
            learned strength: LIVE, NeurIPS 2024), "gated" (vector times sigmoid(g.h + c)), "reft" (LoReFT, NeurIPS
            2024: up = R^T with orthonormal rows R, down = W - R), "heads" (a vector per attention head, scaled by the
            attention mass its demonstrations would take: MimIC, CVPR 2025).
        r: rank of the bottleneck, >= 1; only `lowrank` and `reft` have one.
        activation: phi, one of "silu", "identity", "relu", "gelu", "tanh"; only `lowrank` has a choice.
        layers_to_transform: decoder layers to steer, as in PEFT: an index, a list of indices, or None for all.
        site: "block" (residual stream after the layer) or "attention" (after the attention's addition, before the
            MLP). `heads` always acts on the head outputs in front of `o_proj` and takes the default only.
        scope: "response" (positions whose next token belongs to the response: the last prompt token up to the
            last-but-one response token), "prompt" (the positions before those) or "all".
        normalize_input: divide `h` by its root mean square before the bottleneck.
        preserve_norm: give `h'` the length of `h`.
        alpha: strength; a constant, except for `fixed`, where it is the start value of a learned number per layer.
        hidden_size, num_hidden_layers, base_model_type: filled in from the base model, and checked on loading.

    Raises:
        InputError: a value that is not one of the above.
    """

    kind: str = field(default="lowrank", metadata={"help": f"one of {', '.join(KINDS)}"})
    r: int = field(default=16, metadata={"help": "rank of the bottleneck (lowrank, reft)"})
    activation: str | None = field(default=None, metadata={"help": f"one of {', '.join(ACTIVATIONS)}"})
    layers_to_transform: int | list[int] | None = field(
        default=None, metadata={"help": "decoder layers to steer; none given: all"}
    )
    site: str = field(default="block", metadata={"help": f"one of {', '.join(SITES)}"})
    scope: str = field(default="response", metadata={"help": f"one of {', '.join(SCOPES)}"})
    normalize_input: bool | None = field(default=None, metadata={"help": "h / rms(h) in front of the bottleneck"})
    preserve_norm: bool | None = field(default=None, metadata={"help": "rescale the steered state to its old length"})
    alpha: float | None = field(default=None, metadata={"help": "strength of the push"})
    hidden_size: int | None = field(default=None, metadata={"help": "of the base model; filled in"})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "of the base model; filled in"})
    base_model_type: str | None = field(default=None, metadata={"help": "of the base model; filled in"})

    # PEFT asks every config for these two; the layers to steer are found from the model, not by name.
    target_modules: ClassVar[None] = None
    bias: ClassVar[str] = "none"

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.DIVE
        if self.task_type is None:
            self.task_type = TaskType.CAUSAL_LM
        _one_of("kind", self.kind, KINDS)
        kind = KINDS[self.kind]
        for name in ("activation", "normalize_input", "preserve_norm", "alpha"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(kind, name))
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("site", self.site, SITES)
        _one_of("scope", self.scope, SCOPES)
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not math.isfinite(self.alpha):
            raise InputError(f"alpha: expected a finite number, got {self.alpha!r}")
        for name in ("normalize_input", "preserve_norm"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}: expected True, False or None, got {getattr(self, name)!r}")
        if isinstance(self.r, bool) or not isinstance(self.r, int):
            raise InputError(f"r: expected a whole number, got {self.r!r}")
        if kind.has_rank and self.r < 1:
            raise InputError(
                f"r: kind={self.kind!r} needs a rank of at least 1, got {self.r} (kind='fixed' has no rank)"
            )
        if self.kind != "lowrank" and self.activation != "identity":
            raise InputError(f"activation: kind={self.kind!r} has none; leave it out, got {self.activation!r}")
        if self.kind == "heads":
            self._refuse_what_heads_lacks()
        self._check_layers()

    def _refuse_what_heads_lacks(self) -> None:
        for name, neutral in (("site", "block"), ("normalize_input", False), ("preserve_norm", False)):
            if getattr(self, name) != neutral:
                raise InputError(f"{name}: kind='heads' acts on the attention heads and has none; leave it out")

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is None:
            return
        if isinstance(layers, Sequence) and not isinstance(layers, str):
            self.layers_to_transform = layers = list(layers)
        else:
            layers = [layers]
        if not layers or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in layers):
            raise InputError(
                f"layers_to_transform: expected layer indices from 0, got {self.layers_to_transform!r}; None steers all"
            )
        if len(set(layers)) != len(layers):
            raise InputError(f"layers_to_transform: {self.layers_to_transform!r} names a layer twice")

    def layer_indices(self, num_layers: int) -> list[int]:
        """The steered layers of a decoder with `num_layers` layers; InputError where one is out of range."""
        if self.layers_to_transform is None:
            return list(range(num_layers))
        layers = self.layers_to_transform
        layers = [layers] if isinstance(layers, int) else layers
        if max(layers) >= num_layers:
            raise InputError(
                f"layers_to_transform: {max(layers)} is out of range, the model has layers 0..{num_layers - 1}"
            )
        return sorted(layers)


def _one_of(name: str, value, allowed) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise InputError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
