"""From a transformers model, steered or not, to the plan of a decoder that the compiled engine runs.

Weights go by pointer and are not copied, unless int8 is asked for; vectors (norms, biases) that are not float32 and
adapters of half-precision models are. Everything lies on the decoder's device, the CPU or a GPU. What the engine cannot
run exactly as transformers does is refused with a reason.

D hidden size, V vocabulary, H heads, G key/value heads, E head size, R adapter rank.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from dive_fast.decode.int8 import int8_matrix
from dive_fast.models.hidden import unwrapped
from dive_fast.models.spec import decoder_of, spec_of, text_config_of
from dive_fast.steering import DiveModel

# In the order of the enumerations in csrc/cpu.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GATED_ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")
ACTIVATIONS = ("silu", "identity", "relu", "gelu", "tanh")
# csrc/cpu/decode_types.h
RANK_BLOCK = 8
RANK_PANEL = 16
# Their frequencies are the same for every sequence length.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

_RECORDING = "transformers.utils.output_capturing"
_NO_WEIGHT = (0, 0, 0, 0, 0, 0, 0)
_NO_NORM = (0, 0.0)


@dataclass(frozen=True)
class Family:
    """What a decoder family does beyond its `DecoderSpec`.

    Attributes:
        prefix: what the names of the family's classes start with; a class of another name may compute something else.
        decoder: what follows it in the name of the decoder.
        mlp: the MLP's class where it is another family's.
        norm_offset: norms multiply by (1 + w).
        window_from_config: the sliding window is the configuration's, in every layer, and not the attention's own.
    """

    prefix: str
    decoder: str = "Model"
    mlp: str | None = None
    norm_offset: float = 0.0
    window_from_config: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral", window_from_config=True),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3"),
    "qwen2_5_vl_text": Family("Qwen2_5_VL", decoder="TextModel", mlp="Qwen2MLP"),
    "qwen3_vl_text": Family("Qwen3VLText"),
    "gemma3_text": Family("Gemma3", decoder="TextModel", norm_offset=1.0),
}
"""Text `model_type` -> what the engine must know of it."""


class Unsupported(Exception):
    """The engine cannot run this model or call; the message says why."""


@dataclass
class Plan:
    """A decoder for the engine.

    Attributes:
        values: the arguments of the extension's `engine.Plan`.
        kept: every tensor that `values` points into.
        device: where they lie.
        cache_dtype: of keys and values.
        adapter_index: adapter name -> its place in the plan.
    """

    values: dict
    kept: list[torch.Tensor]
    device: torch.device
    cache_dtype: torch.dtype
    adapter_index: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        self._addresses = [tensor.data_ptr() for tensor in self.kept]

    def in_place(self) -> bool:
        """Whether everything is still where it was: a tensor's storage can be resized or freed under it."""
        return all(tensor.data_ptr() == address for tensor, address in zip(self.kept, self._addresses, strict=True))


def build_plan(model: nn.Module, adapters: tuple[str, ...] = (), int8: bool = False) -> Plan:
    """The plan of `model`'s decoder and the named steering adapters.

    Args:
        int8: multiply with the decoder's matrices and the head rounded to 8 bits; the embedding and adapters stay.

    Raises:
        Unsupported: the family is unknown, something was changed in the model that the engine would not see (hooks,
            replaced layers, quantised or adapted matrices), or an adapter is of kind "heads".
    """
    base = unwrapped(model)
    text = text_config_of(base)
    family = FAMILIES.get(text.model_type)
    if family is None:
        raise Unsupported(f"the family {text.model_type!r} is unknown to it; it knows {', '.join(FAMILIES)}")
    decoder = decoder_of(base)
    _refuse_own_forward(base, decoder)
    _expect_class(decoder, family.prefix + family.decoder)
    device = next(decoder.parameters()).device
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and torch.version.hip):
        raise Unsupported(f"the decoder lies on {device}; it runs on CPUs and CUDA devices")
    if int8 and device.type == "cuda":
        raise Unsupported("8-bit weights are for decoders on the CPU")
    builder = _Builder(base, decoder, text, family, int8)
    values = builder.model()
    dive = dive_model_of(model)
    _refuse_hooks(base, dive)
    values["adapters"] = [builder.adapter(dive, name) for name in adapters]
    return Plan(values, builder.kept, device, builder.cache_dtype, {name: i for i, name in enumerate(adapters)})


def dive_model_of(model: nn.Module) -> DiveModel | None:
    """The steering tuner inside `model`, None without one.

    Raises:
        Unsupported: `model` carries adapters of another PEFT method.
    """
    if not hasattr(model, "peft_config"):
        return None
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, DiveModel):
        raise Unsupported("the model carries adapters of another PEFT method, which it does not run")
    return tuner


class _Builder:
    def __init__(self, base, decoder, text, family: Family, int8: bool):
        self.base, self.decoder, self.text, self.family, self.int8 = base, decoder, text, family, int8
        self.spec = spec_of(base)
        self.kept: list[torch.Tensor] = []
        self.ropes: list[tuple[list[float], float]] = []
        self.rope_index: dict[str | None, int] = {}
        attention = getattr(decoder.layers[0], self.spec.attention)
        _expect_class(attention, f"{family.prefix}Attention")
        _expect_class(attention.k_proj, "Linear")
        self.hidden_size, self.head_size = text.hidden_size, attention.head_dim
        self.heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.cache_dtype = attention.k_proj.weight.dtype
        self.device = attention.k_proj.weight.device

    def model(self) -> dict:
        text = self.text
        activation = getattr(text, "hidden_activation", None) or text.hidden_act
        if activation not in GATED_ACTIVATIONS:
            raise Unsupported(f"the activation {activation!r} is unknown to it")
        if getattr(text, "use_bidirectional_attention", False) or getattr(text, "attn_logit_softcapping", None):
            raise Unsupported("bidirectional attention and capped attention scores are unknown to it")
        if self.heads % self.kv_heads or self.head_size % 2:
            raise Unsupported(f"{self.heads} heads of {self.head_size} on {self.kv_heads} key/value heads")
        embedding, head = self.base.get_input_embeddings(), self.base.get_output_embeddings()
        _expect_class(embedding, "Embedding", "Gemma3TextScaledWordEmbedding")
        _expect_class(head, "Linear")
        if embedding.weight.shape[0] < head.weight.shape[0]:
            raise Unsupported(
                f"the head knows {head.weight.shape[0]} tokens, the embedding {embedding.weight.shape[0]} of them"
            )
        scale = getattr(embedding, "embed_scale", None)
        capped = type(self.base).__name__ == "Gemma3ForCausalLM" and text.final_logit_softcapping
        layers = [self.layer(i, layer) for i, layer in enumerate(self.decoder.layers)]
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": text.intermediate_size,
            "vocabulary": head.weight.shape[0],
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_size": self.head_size,
            "attention_scale": getattr(self.decoder.layers[0], self.spec.attention).scaling,
            "attention_softcap": 0.0,
            "logit_softcap": float(capped or 0.0),
            "activation": GATED_ACTIVATIONS.index(activation),
            "cache_dtype": DTYPES.index(self.cache_dtype),
            "embedding": self.weight(embedding.weight, None, (None, self.hidden_size), "the embedding"),
            "embedding_scale": 1.0 if scale is None else float(scale.to(embedding.weight.dtype)),
            "ropes": self.ropes,
            "layers": layers,
            "final_norm": self.norm(self.decoder.norm, self.hidden_size),
            "head": self.linear(head, (None, self.hidden_size), "the head"),
        }

    def layer(self, index: int, layer: nn.Module) -> dict:
        spec, attention, mlp = self.spec, getattr(layer, self.spec.attention), getattr(layer, self.spec.mlp)
        hidden, inner = self.hidden_size, self.text.intermediate_size
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        where, prefix = f"layer {index}", self.family.prefix
        _expect_class(layer, f"{prefix}DecoderLayer")
        _expect_class(attention, f"{prefix}Attention")
        _expect_class(mlp, self.family.mlp or f"{prefix}MLP")
        window = (
            self.text.sliding_window if self.family.window_from_config else getattr(attention, "sliding_window", None)
        )

        def norm(name: str, own: str, size: int):
            return self.norm(getattr(layer, name), size) if name != own else _NO_NORM

        def head_norm(name: str):
            return self.norm(getattr(attention, name), self.head_size) if hasattr(attention, name) else _NO_NORM

        return {
            "input": self.norm(getattr(layer, spec.input_norm), hidden),
            "post_attention": norm(spec.attention_output, spec.attention, hidden),
            "mlp": self.norm(getattr(layer, spec.mlp_norm), hidden),
            "post_mlp": norm(spec.mlp_output, spec.mlp, hidden),
            "q_norm": head_norm("q_norm"),
            "k_norm": head_norm("k_norm"),
            "q": self.linear(attention.q_proj, (queries, hidden), where),
            "k": self.linear(attention.k_proj, (keys, hidden), where),
            "v": self.linear(attention.v_proj, (keys, hidden), where),
            "o": self.linear(attention.o_proj, (hidden, queries), where),
            "gate": self.linear(mlp.gate_proj, (inner, hidden), where),
            "up": self.linear(mlp.up_proj, (inner, hidden), where),
            "down": self.linear(mlp.down_proj, (hidden, inner), where),
            "rope": self.rope(getattr(attention, "layer_type", None)),
            "window": int(window or 0),
        }

    def rope(self, layer_type: str | None) -> int:
        """The place in `ropes` of a layer type's frequencies."""
        rotary = self.decoder.rotary_emb
        _expect_class(rotary, f"{self.family.prefix}RotaryEmbedding")
        prefix = f"{layer_type}_" if hasattr(rotary, f"{layer_type}_inv_freq") else ""
        if prefix not in self.rope_index:
            kind = rotary.rope_type[layer_type] if prefix else rotary.rope_type
            if kind not in ROPE_TYPES:
                raise Unsupported(f"rope type {kind!r} is unknown to it")
            frequencies = getattr(rotary, f"{prefix}inv_freq")
            if frequencies.numel() * 2 != self.head_size:
                raise Unsupported("rope turns a part of each head only")
            self.rope_index[prefix] = len(self.ropes)
            self.ropes.append((frequencies.float().tolist(), float(getattr(rotary, f"{prefix}attention_scaling"))))
        return self.rope_index[prefix]

    def norm(self, norm: nn.Module, size: int) -> tuple:
        _expect_class(norm, f"{self.family.prefix}RMSNorm")
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        weight, offset = _plain(norm.weight, "a norm"), self.family.norm_offset
        return self.vector(weight.float() + offset if offset else weight, size, "a norm"), float(eps)

    def linear(self, linear: nn.Module, shape: tuple, where: str) -> tuple:
        _expect_class(linear, "Linear")
        whole = self.weight(linear.weight, linear.bias, shape, where)
        if not self.int8:
            return whole
        matrix = int8_matrix(linear.weight)
        self.kept += matrix
        _, dtype, rows, columns, _, bias, _ = whole
        return matrix.values.data_ptr(), dtype, rows, columns, matrix.row_stride, bias, matrix.scales.data_ptr()

    def weight(self, weight: torch.Tensor, bias, shape: tuple, where: str) -> tuple:
        """(address, dtype, rows, columns, row stride, bias, scales) of a matrix, in place."""
        weight = _plain(weight, where)
        if weight.device != self.device:
            raise Unsupported(f"{where} lies on {weight.device}, other parts of the decoder on {self.device}")
        if weight.dtype not in DTYPES:
            raise Unsupported(f"{where} holds {weight.dtype}; it takes float32, bfloat16 and float16")
        if weight.dim() != 2 or tuple(weight.shape) != tuple(
            weight.shape[i] if n is None else n for i, n in enumerate(shape)
        ):
            raise Unsupported(f"{where} has a matrix of {tuple(weight.shape)}, expected {shape}")
        rows, columns = weight.shape
        # A dimension of one element may have any stride.
        stride = weight.stride(0) if rows > 1 else columns
        if (columns > 1 and weight.stride(1) != 1) or stride < columns:
            raise Unsupported(f"{where} has a matrix whose rows do not follow each other in memory")
        end = (weight.storage_offset() + (rows - 1) * stride + columns) * weight.element_size()
        if weight.untyped_storage().nbytes() < end:
            raise Unsupported(f"{where} has a matrix whose memory was taken away")
        self.kept.append(weight)
        address = 0 if bias is None else self.vector(bias, rows, f"{where}, a bias")
        return weight.data_ptr(), DTYPES.index(weight.dtype), rows, columns, stride, address, 0

    def vector(self, values: torch.Tensor, size: int, where: str) -> int:
        """The address of `size` float32 numbers, kept alive."""
        values = _plain(values, where)
        if tuple(values.shape) != (size,):
            raise Unsupported(f"{where} has {tuple(values.shape)} numbers, expected {size}")
        values = values.to(self.device, torch.float32).contiguous()
        self.kept.append(values)
        return values.data_ptr()

    def adapter(self, dive: DiveModel, name: str) -> dict:
        if dive.peft_config[name].kind == "heads":
            raise Unsupported(f"adapter {name!r} is of kind 'heads', which steers inside the attention")
        sites = {"attention": [], "block": []}
        for layer in self.decoder.layers:
            steering = getattr(layer, "steering", None)
            acts = steering is not None and name in steering.configs
            for site, found in sites.items():
                here = acts and steering.configs[name].site == site
                found.append(self.steering(steering.computation(name)) if here else None)
        return sites

    def steering(self, parts: dict) -> dict:
        down, up, gate = parts.get("down"), parts.get("up"), parts.get("gate")
        rank, hidden = 0 if down is None else down.shape[0], self.hidden_size
        matrices = {"matrices": _NO_WEIGHT, "bias": 0}
        if rank:
            if tuple(up.shape) != (hidden, rank):
                raise Unsupported(f"an adapter has a matrix of {tuple(up.shape)}, expected {(hidden, rank)}")
            pair = [_plain(x, "an adapter").to(self.device, torch.float32) for x in (down, up)]
            pair = in_reading_order(*pair).to(self.adapter_dtype(pair))
            matrices["matrices"] = self.weight(pair, None, tuple(pair.shape), "an adapter")
            matrices["bias"] = 0 if parts["bias"] is None else self.vector(parts["bias"], rank, "an adapter's bias")
        static = parts["static"]
        return matrices | {
            "rank": rank,
            "static": 0 if static is None else self.vector(static, hidden, "an adapter's static push"),
            "alpha": float(parts["alpha"]),
            "gate_direction": 0 if gate is None else self.vector(gate[0], hidden, "an adapter's gate"),
            "gate_offset": 0.0 if gate is None else float(gate[1]),
            "activation": ACTIVATIONS.index(parts["activation"]),
            "normalize_input": parts["normalize_input"],
            "preserve_norm": parts["preserve_norm"],
        }

    def adapter_dtype(self, matrices: list[torch.Tensor]) -> torch.dtype:
        """float16 where the model's own matrices have half precision too (an adapter's bytes are its cost, and float16
        has more digits than bfloat16), unless numbers are too large or too small for that; float32 else."""

        def fits(matrix: torch.Tensor) -> bool:
            return bool((matrix.half().float() - matrix).abs().amax() <= 2**-11 * matrix.abs().amax())

        half = self.cache_dtype != torch.float32 and all(map(fits, matrices))
        return torch.float16 if half else torch.float32


def in_reading_order(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[R, D] and [D, R] -> [2 R, D padded to whole panels]: for every block of ranks their rows of `down`, then their
    columns of `up`, panel of rows by panel of rows. Whoever computes with some of the ranks reads one stretch of memory
    from its beginning to its end."""
    padding = (0, -down.shape[1] % RANK_PANEL)
    down, up = (nn.functional.pad(matrix, padding) for matrix in (down, up.T))
    halves = []
    for rows, columns in zip(down.split(RANK_BLOCK), up.split(RANK_BLOCK), strict=True):
        halves += [rows, columns.unflatten(1, (-1, RANK_PANEL)).transpose(0, 1).reshape(rows.shape)]
    return torch.cat(halves)


def _plain(values: torch.Tensor, where: str) -> torch.Tensor:
    """`values` without their history, numbers in memory with nothing else to say how they are meant."""
    if values.device.type == "meta":
        raise Unsupported(f"{where} lies on meta: it has no numbers yet")
    values = values.detach()
    if type(values.data) is not torch.Tensor or values.layout != torch.strided or values.is_quantized:
        kind = type(values.data).__name__ if values.layout == torch.strided else values.layout
        raise Unsupported(f"{where} holds a {kind}, not a plain tensor")
    if not values.is_floating_point():
        raise Unsupported(f"{where} holds {values.dtype}, not floating-point numbers")
    return values


def _expect_class(module: nn.Module, *names: str) -> None:
    """The module is transformers' or torch's own of that name, with its own forward."""
    cls = type(module)
    own = cls.__module__.startswith(("transformers.", "torch.nn."))
    if "forward" in vars(module):
        raise Unsupported(f"the forward of a {cls.__name__} was replaced")
    if cls.__name__ not in names or not own:
        raise Unsupported(f"the model has a {cls.__module__}.{cls.__name__} where it expects {' or '.join(names)}")


def _refuse_own_forward(base: nn.Module, decoder: nn.Module) -> None:
    """Around the decoder stands any of transformers' models, but no other code between it and the logits."""
    for module in base.modules():
        if module is decoder or not any(inner is decoder for inner in module.modules()):
            continue
        cls = type(module)
        if "forward" in vars(module):
            raise Unsupported(f"the forward of a {cls.__name__} was replaced")
        if not cls.forward.__module__.startswith(("transformers.", "dive_fast.models.")):
            raise Unsupported(f"{cls.__module__}.{cls.__name__} has a forward of its own, which it would pass by")


def _refuse_hooks(base: nn.Module, dive: DiveModel | None) -> None:
    """Whatever hooks do, the engine would pass them by; those that only record what transformers was asked to show may
    stay, and those of a vision tower run with the prompt."""
    ours = set() if dive is None else {handle.id for handle in dive.hook_handles()}
    decoder = decoder_of(base)
    passed_by = {id(m) for part in (decoder, base.get_output_embeddings()) for m in part.modules()}
    for name, module in base.named_modules():
        if id(module) not in passed_by and not any(m is decoder for m in module.modules()):
            continue
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if any(key not in ours and getattr(hook, "__module__", None) != _RECORDING for key, hook in hooks.items()):
                raise Unsupported(f"{name or 'the model'} has forward hooks, which it would pass by")
