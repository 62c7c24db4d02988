"""The adapters of one decoder layer: their parameters, and how they act on the residual stream.

The module is a child of the decoder layer and acts inside its forward pass (forward.py), or by a hook where the family
is not described, so the layer keeps its name and its place in the model: captured hidden states, sharding and
activation checkpointing go on working.

B batch rows, T tokens, D hidden size, H heads, R rank.
"""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dive_fast import ops
from dive_fast.models.spec import DecoderSpec
from dive_fast.models.writes import write_count
from dive_fast.steering.config import DiveConfig
from dive_fast.steering.forward import steer_inside, steer_no_more
from dive_fast.steering.heads import demonstration_share, install_heads_hook
from dive_fast.steering.positions import STEERING_KWARG, SteeringCall

# Start values as published: LIVE draws its vectors with standard deviation 0.01, MimIC its head vectors with 0.001.
FIXED_STD = 0.01
HEADS_STD = 0.001


class DiveLayer(nn.Module, BaseTunerLayer):
    """The steering adapters of one decoder layer, by adapter name."""

    adapter_layer_names = (
        "dive_down",
        "dive_up",
        "dive_bias",
        "dive_static",
        "dive_alpha",
        "dive_gate",
        "dive_gate_bias",
        "dive_basis",
        "dive_head_vectors",
        "dive_head_query",
        "dive_head_bias",
    )

    def __init__(self, layer: nn.Module, spec: DecoderSpec | None, hidden_size: int, norm_eps: float):
        super().__init__()
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.configs: dict[str, DiveConfig] = {}
        self.spec = spec
        self.hidden_size = hidden_size
        self.norm_eps = norm_eps
        self._layer = (layer,)  # in a tuple: the layer owns this module, not the other way round
        self._handles: dict[str, list] = {}
        self._basis_cache: dict[str, tuple[int, torch.Tensor]] = {}

    def update_layer(self, adapter_name: str, config: DiveConfig) -> None:
        """Create the parameters of a new adapter (float32, on the layer's device) and install the hooks it needs."""
        layer = self._layer[0]
        device = next(p.device for name, p in layer.named_parameters() if not name.startswith("steering."))
        make = {"device": device, "dtype": torch.float32}
        size, rank = self.hidden_size, config.r
        if config.kind == "lowrank":
            down = torch.empty(rank, size, **make)
            nn.init.kaiming_uniform_(down, a=5**0.5)
            self._add("dive_down", adapter_name, down)
            self._add("dive_bias", adapter_name, torch.zeros(rank, **make))
            self._add("dive_up", adapter_name, torch.zeros(size, rank, **make))
            self._add("dive_static", adapter_name, torch.zeros(size, **make))
        elif config.kind == "fixed":
            self._add("dive_static", adapter_name, torch.randn(size, **make) * FIXED_STD)
            self._add("dive_alpha", adapter_name, torch.full((), float(config.alpha), **make))
        elif config.kind == "gated":
            self._add("dive_static", adapter_name, torch.zeros(size, **make))
            self._add("dive_gate", adapter_name, torch.zeros(size, **make))
            self._add("dive_gate_bias", adapter_name, torch.zeros((), **make))
        elif config.kind == "reft":
            basis = torch.randn(size, rank, **make)
            self._add("dive_basis", adapter_name, basis)
            self._add("dive_down", adapter_name, _orthonormal_rows(basis.detach()).clone())
            self._add("dive_bias", adapter_name, torch.zeros(rank, **make))
        elif config.kind == "heads":
            attention = getattr(layer, self.spec.attention)
            heads, head_dim = attention.o_proj.in_features // attention.head_dim, attention.head_dim
            self._add("dive_head_vectors", adapter_name, torch.randn(heads, head_dim, **make) * HEADS_STD)
            self._add("dive_head_query", adapter_name, torch.zeros(heads, head_dim, **make))
            self._add("dive_head_bias", adapter_name, torch.zeros(heads, **make))
        self.configs[adapter_name] = config
        self._install_hooks("heads" if config.kind == "heads" else config.site)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _add(self, group: str, adapter_name: str, value: torch.Tensor) -> None:
        getattr(self, group)[adapter_name] = nn.Parameter(value)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)
        self._basis_cache.pop(adapter_name, None)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        layer = self._layer[0]
        device = device or next(p.device for n, p in layer.named_parameters() if not n.startswith("steering."))
        for group in self.adapter_layer_names:
            parameters = getattr(self, group)
            if adapter_name in parameters and parameters[adapter_name].device != device:
                parameters[adapter_name].data = parameters[adapter_name].data.to(device)

    # -- hooks -----------------------------------------------------------------------------------------------------

    def _install_hooks(self, site: str) -> None:
        """Take the place that `site` needs in the layer, once."""
        if site in self._handles:
            return
        layer = self._layer[0]
        self._handles[site] = []
        if site == "heads":
            self._handles[site] = install_heads_hook(getattr(layer, self.spec.attention), self)
        elif self.spec is not None:
            steer_inside(layer)
        else:  # ours comes first, so that others see the steered state
            handle = layer.register_forward_hook(self._steer_output, with_kwargs=True, prepend=True)
            self._handles[site] = [handle]

    def hook_handles(self) -> list:
        """Handles of the hooks in the layer."""
        return [handle for handles in self._handles.values() for handle in handles if hasattr(handle, "id")]

    def remove_hooks(self) -> None:
        """Give the decoder layer back as it was."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles.clear()
        steer_no_more(self._layer[0])

    def _steer_output(self, layer, args, kwargs, output):
        """For decoders that no `DecoderSpec` describes: steer what the layer gives."""
        call = kwargs.get(STEERING_KWARG)
        if call is None:
            return None
        call.visits += 1
        hidden = output[0] if isinstance(output, tuple) else output
        steered = self.add(hidden, None, call, site="block")
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    # -- the computation ---------------------------------------------------------------------------------------------

    def add(self, residual, update, call: SteeringCall | None, site: str) -> torch.Tensor:
        """`residual + update`, steered by every adapter of this site in the order of activation."""
        if update is not None and update.dtype != residual.dtype:  # under autocast: added as by the layer's own forward
            residual, update = residual + update, None
        call = None if call is None else call.on(residual.device)
        for name, rows in () if call is None else self.adapters_of(call):
            config = self.configs[name]
            if config.site != site or config.kind == "heads":
                continue
            mask = call.masks[config.scope]
            if rows is None:
                residual, update = self._steer_by(name, residual, update, mask), None
            else:
                part = self._steer_by(
                    name,
                    residual[rows],
                    None if update is None else update[rows],
                    None if mask is None else mask[rows],
                )
                whole = residual if update is None else residual + update
                residual, update = whole.index_copy(0, rows, part.to(whole.dtype)), None
        return residual if update is None else residual + update

    def adapters_of(self, call: SteeringCall):
        """(adapter name, its batch rows or None for all) for every adapter of this layer that acts in `call`."""
        if call.rows is not None:
            return [(name, rows) for name, rows in call.rows.items() if name in self.configs]
        return [(name, None) for name in self.active_adapters if name in self.configs]

    def _steer_by(self, name: str, residual, update, mask) -> torch.Tensor:
        return ops.steer(residual, update, mask=mask, norm_eps=self.norm_eps, **self.computation(name))

    def computation(self, name: str) -> dict:
        """An adapter's arguments of `dive_fast.ops.steer`; not for kind "heads", which is no push on the stream."""
        config = self.configs[name]
        options = {
            "static": self._get("dive_static", name),
            "alpha": self._get("dive_alpha", name, config.alpha),
            "activation": config.activation,
            "normalize_input": config.normalize_input,
            "preserve_norm": config.preserve_norm,
        }
        if config.kind == "lowrank":
            options |= {"down": self.dive_down[name], "up": self.dive_up[name], "bias": self.dive_bias[name]}
        elif config.kind == "reft":
            basis = self._basis(name)
            down = self.dive_down[name] - basis
            options |= {"down": down, "up": basis.T, "bias": self.dive_bias[name]}
        elif config.kind == "gated":
            options["gate"] = (self.dive_gate[name], self.dive_gate_bias[name])
        return options

    def _get(self, group: str, name: str, default=None):
        parameters = getattr(self, group)
        return parameters[name] if name in parameters else default

    def _basis(self, name: str) -> torch.Tensor:
        """R [R, D] with orthonormal rows, from its free parameter; kept between calls while nothing trains it."""
        basis = self.dive_basis[name]
        if torch.is_grad_enabled() and basis.requires_grad:
            # A step may follow, and fused optimisers change parameters without a new version.
            self._basis_cache.pop(name, None)
            return _orthonormal_rows(basis)
        version = write_count(basis)
        kept = self._basis_cache.get(name)
        if kept is None or kept[0] != version or kept[1].device != basis.device:
            with torch.no_grad():
                kept = (version, _orthonormal_rows(basis))
            self._basis_cache[name] = kept
        return kept[1]

    def push_heads(self, output, query, key, attention_mask, scaling, call: SteeringCall) -> torch.Tensor:
        """Attention output [B, T, H, head_dim] plus mu * v per head at the steered positions."""
        call.visits += 1
        call = call.on(output.device)
        for name, rows in self.adapters_of(call):
            config = self.configs[name]
            if config.kind != "heads":
                continue
            share = demonstration_share(
                query, key, attention_mask, scaling, self.dive_head_query[name], self.dive_head_bias[name]
            )
            push = config.alpha * share.unsqueeze(-1) * self.dive_head_vectors[name]
            mask = call.masks[config.scope]
            steered = torch.ones(output.shape[:2], dtype=torch.bool, device=output.device) if mask is None else mask
            if rows is not None:
                chosen = torch.zeros(output.shape[0], dtype=torch.bool, device=output.device)
                chosen[rows] = True
                steered = steered & chosen[:, None]
            output = torch.where(steered[:, :, None, None], (output + push).to(output.dtype), output)
        return output


def _orthonormal_rows(basis: torch.Tensor) -> torch.Tensor:
    """[R, D] with orthonormal rows spanning the columns of `basis` [D, R]: Q of its QR, R's diagonal positive."""
    q, r = torch.linalg.qr(basis.float())
    sign = torch.where(torch.diagonal(r) < 0, -1.0, 1.0)
    return (q * sign).T.contiguous()
