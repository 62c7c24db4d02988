"""The PEFT tuner: puts a `DiveLayer` into every steered decoder layer and tells it which positions to steer."""

import threading
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from dive_fast.errors import InputError
from dive_fast.models.cache_argument import cache_among
from dive_fast.models.spec import DECODER_SPECS, decoder_of, spec_of, text_config_of
from dive_fast.steering.config import DiveConfig
from dive_fast.steering.heads import check_attention
from dive_fast.steering.layer import DiveLayer
from dive_fast.steering.positions import (
    STEERING_KWARG,
    Generation,
    SteeringCall,
    response_positions_from_labels,
    steering_masks,
)

# Without the tuner's prefix "dive_", by which PEFT tells parameters from the modules that hold them.
STEERING_NAME = "steering"


class _Calls(threading.local):
    """What the calls under way in a thread have said; threads that share a model do not see each other's."""

    given_positions: torch.Tensor | None = None
    generation: Generation | None = None
    adapter_names: list[str] | None = None
    steers: bool = True

    def __reduce__(self):  # a copied model has no calls under way
        return type(self), ()

    @contextmanager
    def say(self, name: str, value):
        before = getattr(self, name)
        setattr(self, name, value)
        try:
            yield
        finally:
            setattr(self, name, before)


class DiveModel(BaseTuner):
    """Steers a frozen decoder; made by `peft.get_peft_model(base, DiveConfig(...))`.

    Beyond the base model's own arguments, `forward` takes

        response_positions: [B, T] bool, True where the next token belongs to the response. Without it the labels say
            so; with neither, see `dive_fast.steering.positions.steering_masks`.
        adapter_names: PEFT's list of one adapter name per batch row, "__base__" for none; in eval mode only.
    """

    prefix: str = "dive_"
    tuner_layer_cls = DiveLayer
    target_module_mapping: dict = {}

    # A class attribute, because BaseTuner injects before __init__ is done.
    _decoder_handles: tuple = ()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._calls = _Calls()

    # -- injection -------------------------------------------------------------------------------------------------

    def _check_new_adapter_config(self, config: DiveConfig) -> None:
        super()._check_new_adapter_config(config)
        text = text_config_of(self.model)
        found = {
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_hidden_layers,
            "base_model_type": text.model_type,
        }
        for name, value in found.items():
            recorded = getattr(config, name)
            if recorded is not None and recorded != value:
                raise InputError(
                    f"adapter: it was made for a base model with {name}={recorded}, this one has {value}; "
                    "load the base model the adapter was trained on"
                )
        if (config.kind == "heads" or config.site != "block") and spec_of(self.model) is None:
            what = "kind='heads'" if config.kind == "heads" else f"site={config.site!r}"
            raise InputError(
                f"{what}: known for the families {', '.join(DECODER_SPECS)}, not for {text.model_type!r}; "
                "site='block' works on any decoder"
            )
        config.layer_indices(text.num_hidden_layers)
        for name, value in found.items():
            setattr(config, name, value)

    def _prepare_adapter_config(self, peft_config: DiveConfig, model_config: dict) -> DiveConfig:
        return peft_config

    def _prepare_model(self, peft_config: DiveConfig, model: nn.Module) -> None:
        if not self._decoder_handles:
            decoder = decoder_of(model)
            self._decoder_handles = (
                decoder.register_forward_pre_hook(self._begin_pass, with_kwargs=True),
                decoder.register_forward_hook(self._end_pass, with_kwargs=True),
            )

    def _check_target_module_exists(self, peft_config: DiveConfig, key: str) -> bool:
        layers = decoder_of(self.model).layers
        wanted = {id(layers[i]) for i in peft_config.layer_indices(len(layers))}
        return id(self.model.get_submodule(key)) in wanted

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        if not hasattr(target, STEERING_NAME):
            text = text_config_of(self.model)
            eps = getattr(text, "rms_norm_eps", 1e-6)
            steering = DiveLayer(target, spec_of(self.model), text.hidden_size, eps)
            steering.set_adapter(self.active_adapters)
            target.add_module(STEERING_NAME, steering)
        target.get_submodule(STEERING_NAME).update_layer(adapter_name, peft_config)

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.active_adapters and len(self.peft_config) > 1:
            # Chosen here for all layers alike: each has the adapters of its own alone, and would choose among those.
            left = [name for name in self.active_adapters if name != adapter_name]
            left = left or [next(name for name in self.peft_config if name != adapter_name)]
            self.set_adapter(left, inference_mode=self.peft_config[left[0]].inference_mode)
        super().delete_adapter(adapter_name)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs) -> nn.Module:
        if merge:
            raise InputError(
                "merge_and_unload: a push that depends on the hidden state cannot be merged into weights; "
                "use unload() to get the base model back"
            )
        for layer in decoder_of(self.model).layers:
            if hasattr(layer, STEERING_NAME):
                layer.get_submodule(STEERING_NAME).remove_hooks()
                delattr(layer, STEERING_NAME)
        for handle in self._decoder_handles:
            handle.remove()
        self._decoder_handles = ()
        del self.model.peft_config
        return self.model

    # -- calls -----------------------------------------------------------------------------------------------------

    def forward(self, *args, response_positions: torch.Tensor | None = None, **kwargs):
        if response_positions is None and kwargs.get("labels") is not None:
            response_positions = response_positions_from_labels(kwargs["labels"])
        with self._calls.say("given_positions", response_positions):
            return self.model(*args, **kwargs)

    def generate(self, *args, **kwargs):
        """The base model's `generate`, steered behind the prompt."""
        prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        prompt = kwargs.get("inputs_embeds") if prompt is None else prompt
        if prompt is None:
            raise InputError("generate: give the prompt as input_ids (or inputs_embeds)")
        with self.generating(prompt.shape[1], kwargs.get("attention_mask")):
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def generating(self, prompt_length: int, prompt_mask: torch.Tensor | None):
        """Passes within are parts of one generation: of a prompt of that many columns, and of what follows it."""
        with self._calls.say("generation", Generation(prompt_length, prompt_mask)):
            yield

    @contextmanager
    def rows_steered_by(self, adapter_names):
        """Each batch row's adapter for the passes within, as `adapter_names` of a call; None: the active ones."""
        with self._enable_peft_forward_hooks(adapter_names=adapter_names):
            yield

    def hook_handles(self) -> list:
        """Handles of every hook that steering has put into the model."""
        layers = [
            layer.get_submodule(STEERING_NAME)
            for layer in decoder_of(self.model).layers
            if hasattr(layer, STEERING_NAME)
        ]
        return [*self._decoder_handles, *(handle for layer in layers for handle in layer.hook_handles())]

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        names = kwargs.get("adapter_names")
        if names is not None:
            if self.training:
                raise InputError("adapter_names: rows with different adapters are for inference; call model.eval()")
            known = set(self.peft_config) | {"__base__"}
            unknown = sorted(set(names) - known)
            if unknown:
                raise InputError(f"adapter_names: no adapter {unknown[0]!r}; there are {', '.join(sorted(known))}")
        with self._calls.say("adapter_names", None if names is None else list(names)):
            yield

    def _begin_pass(self, decoder, args, kwargs):
        """In front of the decoder: work out the steered positions of this pass and send them along."""
        acting = self.acting_adapters()
        if not acting:
            return None
        if any(self.peft_config[name].kind == "heads" for name in acting):
            check_attention(decoder.config._attn_implementation)
        tokens = kwargs.get("inputs_embeds")
        tokens = kwargs.get("input_ids", args[0] if args else None) if tokens is None else tokens
        cache = cache_among((*args, *kwargs.values()))
        shape, mask = (tokens.shape[0], tokens.shape[1]), kwargs.get("attention_mask")
        if cache is None and isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] > shape[1]:
            # A pass behind a cache that was not found: positions, and with them tokens, would be wrong without a word.
            raise InputError(
                f"attention_mask: it has {mask.shape[1]} columns for {shape[1]} tokens, and no transformers Cache is "
                "among the arguments"
            )
        masks = steering_masks(
            {self.peft_config[name].scope for name in acting},
            shape,
            device=tokens.device,
            past_length=0 if cache is None else int(cache.get_seq_length()),
            attention_mask=mask,
            response_positions=self._calls.given_positions,
            generation=self._calls.generation,
        )
        kwargs[STEERING_KWARG] = SteeringCall(masks, self._rows(shape[0], tokens.device))
        return args, kwargs

    def _end_pass(self, decoder, args, kwargs, output):
        call = kwargs.get(STEERING_KWARG)
        if call is not None and call.visits == 0:
            raise InputError(
                f"model: {type(decoder).__name__} does not hand keyword arguments on to its layers, so steering would "
                "silently do nothing; this family is not supported"
            )

    @contextmanager
    def unsteered(self):
        """The base model's own passes; unlike PEFT's `disable_adapter` it leaves `requires_grad` alone."""
        with self._calls.say("steers", False):
            yield

    def acting_adapters(self) -> list[str]:
        """The adapters of a pass made now, in the order in which they act."""
        if not self._calls.steers:
            return []
        layers = decoder_of(self.model).layers
        if all(
            layer.get_submodule(STEERING_NAME).disable_adapters for layer in layers if hasattr(layer, STEERING_NAME)
        ):
            return []
        given = self._calls.adapter_names
        names = self.active_adapters if given is None else sorted(set(given) - {"__base__"})
        return [name for name in names if name in self.peft_config]

    def _rows(self, batch: int, device) -> dict[str, torch.Tensor] | None:
        if self._calls.adapter_names is None:
            return None
        names = self._calls.adapter_names
        if batch % len(names):
            raise InputError(f"adapter_names: expected one name per row ({batch}), got {len(names)}")
        names = [name for name in names for _ in range(batch // len(names))]  # beams and n-best follow their row
        return {
            name: torch.tensor([i for i, other in enumerate(names) if other == name], device=device)
            for name in dict.fromkeys(names)
            if name != "__base__"
        }
