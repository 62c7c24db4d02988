"""The adapters that `train` fits and `load` reads: our steering, and PEFT's own methods as baselines to it."""

import copy
import json
import logging
from pathlib import Path

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from dive_fast.devices import on_device, placement
from dive_fast.errors import InputError
from dive_fast.models.backbone import load_backbone
from dive_fast.models.fingerprint import forward_settings, model_fingerprint
from dive_fast.models.processors import image_backend
from dive_fast.steering import DiveConfig

SETUP_FILE = "dive_setup.json"
"""What an adapter was trained with, beside it."""

logger = logging.getLogger(__name__)

# What PEFT notes in every configuration about where it was made and what it is used for now.
_BOOKKEEPING = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "task_type"}


def adapted(model_or_path, processor, steering: peft.PeftConfig | None) -> tuple[peft.PeftModel, object]:
    """(the PEFT model to train, its processor): a model with adapters as it is, any other with a fresh one.

    Raises:
        InputError: no processor, adapters and a configuration at once, an adapter that cannot be trained here, a base
            model that an earlier call has put adapters into.
    """
    model = model_or_path
    if isinstance(model, str | Path):
        model, loaded = load_backbone(str(model))
        processor = processor or loaded
    if processor is None:
        raise InputError("processor: a model object comes without one; give its processor or fast tokenizer")
    if isinstance(model, peft.PeftModel):
        if steering is not None:
            raise InputError("steering: the model already carries adapters; leave steering out, or pass the base model")
        if len(model.active_adapters) != 1:
            names = ", ".join(model.active_adapters) or "none"
            raise InputError(
                f"model: one adapter is trained at a time, active are {names}; choose with model.set_adapter(name)"
            )
        _refuse_unfit(model.active_peft_config, "model")
        _refuse_adapted_head(model)
        [active] = model.active_adapters
        if not any(p.requires_grad for name, p in model.named_parameters() if active in name.split(".")):
            model.set_adapter(active)  # `load` gives it for inference, without gradients
    else:
        model = with_adapter(model, steering or DiveConfig())
    return model, processor


def with_adapter(base: nn.Module, config: peft.PeftConfig) -> peft.PeftModel:
    """`base` with a fresh adapter to train.

    Raises:
        InputError: PEFT refuses the configuration, or the loss could not be right with it; `base` holds adapters.
    """
    _refuse_unfit(config, "steering")
    refuse_adapters(base, "model")
    try:
        # A copy: PEFT and the tuners note in it what it was used for, and the caller may use it again.
        config = copy.deepcopy(config)
        # PEFT stores the configurations of finished adapters so, and would freeze a fresh one.
        config.inference_mode = False
        model = peft.get_peft_model(base, config)
    except InputError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        # PEFT's own refusals: modules that are not there, a rank of 0, a package that is missing
        why = " ".join(str(error).split())[:300]
        raise InputError(f"steering: PEFT refuses this {_method(config)} configuration ({why}); mend it") from error
    try:
        _refuse_adapted_head(model)
    except InputError:
        model.unload()
        raise
    return model


def refuse_adapters(base: nn.Module, argument: str) -> None:
    """A second PEFT model around one base would run the first one's adapters as well, unseen.

    Raises:
        InputError: adapters lie in the layers of `base`.
    """
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise InputError(
            f"{argument}: its layers hold adapters of an earlier PEFT model (by train, load or peft.get_peft_model), "
            "which would act beside new ones; call unload() on that PEFT model first, or add to it with load_adapter"
        )


def _method(config: peft.PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _refuse_unfit(config: peft.PeftConfig, argument: str) -> None:
    """The loss reads the decoder's last states at the tokens' own positions; the frozen head multiplies them."""
    if isinstance(config, DiveConfig):
        return
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise InputError(
            f"{argument}: {_method(config)} puts tokens of its own in front of the prompt, and the loss would read its "
            "states at the wrong places; take a method that adapts layers, such as LoRA"
        )
    if isinstance(config, peft.AdaLoraConfig):
        raise InputError(f"{argument}: ADALORA changes its ranks from outside between steps, which nothing here does")
    if getattr(config, "bias", "none") != "none":
        raise InputError(f"{argument}: bias={config.bias!r} trains the frozen model's own biases; leave it at 'none'")


def _refuse_adapted_head(model: peft.PeftModel) -> None:
    head = model.get_base_model().get_output_embeddings()
    if isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper):
        raise InputError(
            "steering: it adapts the head (lm_head), which the loss reads as frozen; leave it out of target_modules "
            "and modules_to_save"
        )


def adapter_settings(config: peft.PeftConfig) -> dict:
    """What makes two adapters the same kind of adapter, as JSON values."""
    values = config.to_dict()
    if isinstance(config, DiveConfig):
        return {name: value for name, value in values.items() if name in DiveConfig.__annotations__}
    plain = json.loads(
        json.dumps(values, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )
    return {name: value for name, value in plain.items() if name not in _BOOKKEEPING}


def trainable_parameters(model: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def load(base_or_path, adapter_dir, *, dtype=None, device=None) -> peft.PeftModel:
    """The base model with a trained adapter, in eval mode.

    Where `train`'s note of its weights lies beside the adapter, other weights of the same shape are warned of.

    Args:
        base_or_path: a transformers model, or a name as in `train`; with a name the PEFT model carries the processor
            as `model.processor`, where `generate` finds it.
        adapter_dir: what `train` wrote.
        dtype: of a model loaded by name.
        device: "cpu", "cuda:1", or "auto" for as many GPUs as the model takes; None leaves a given model where it is,
            and puts one loaded by name on the current GPU where there is one.

    Raises:
        InputError: no adapter there, one that is cut short, one for another base model; a model that holds adapters
            already; no such device, or no room on it.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(adapter_dir)
    weights = folder / "adapter_model.safetensors"
    for file in (folder / "adapter_config.json", weights):
        if not file.is_file():
            raise InputError(f"adapter_dir: {folder} holds no adapter, {file.name} is missing")
    try:
        with safe_open(weights, framework="pt") as file:
            saved = set(file.keys())
    except SafetensorError as error:
        raise InputError(f"adapter_dir: {weights} is damaged or cut short ({error}); copy it again") from error
    except OSError as error:
        raise InputError(f"adapter_dir: {weights} cannot be read ({error}); mend its permissions") from error
    config = _stored_config(folder)
    processor = None
    if isinstance(base_or_path, str | Path):
        base_or_path, processor = load_backbone(str(base_or_path), dtype=dtype)
    refuse_adapters(base_or_path, "base_or_path")
    if processor is not None or device is not None:
        base_or_path = on_device(base_or_path, placement(device))
    try:
        model = peft.PeftModel.from_pretrained(base_or_path, folder, config=config)
    except InputError:
        raise
    except (RuntimeError, ValueError) as error:  # how torch reports tensors of other shapes, and PEFT missing modules
        why = " ".join(str(error).split())[:300]
        raise InputError(f"adapter_dir: {weights} does not fit its adapter_config.json or the model ({why})") from error
    expected = set(peft.get_peft_model_state_dict(model))
    if saved != expected:
        odd = sorted(saved ^ expected)[0]
        raise InputError(
            f"adapter_dir: {weights} does not fit its adapter_config.json (first difference: {odd}); "
            "copy both from the same run"
        )
    noted = _noted(folder)
    _warn_of_other_weights(model, folder, noted)
    if processor is not None:
        _warn_of_other_pixels(processor, folder, noted)
        model.processor = processor
    return model.eval()


def base_settings(base: nn.Module) -> dict:
    """Which frozen model an adapter is trained on, as JSON values."""
    return {
        "dtype": str(base.dtype),
        "fingerprint": model_fingerprint(base, any_dtype=True),
        "settings": forward_settings(base),
    }


def _noted(folder: Path) -> dict:
    """`train`'s settings beside the adapter; empty where it was copied without them, or written by something else."""
    try:
        noted = json.loads((folder / SETUP_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _warn_of_other_pixels(processor, folder: Path, noted: dict) -> None:
    """transformers resizes by torchvision where it is installed and by PIL elsewhere, to pixels that differ."""
    there, here = noted.get("images"), image_backend(processor)
    if there is not None and here is not None and there != here:
        logger.warning(
            "adapter_dir: %s was trained on images that %s resized; here it is %s, whose pixels differ a little "
            "(torchvision does it where it is installed)",
            folder,
            there,
            here,
        )


def _warn_of_other_weights(model: peft.PeftModel, folder: Path, noted: dict) -> None:
    """An adapter fits every model of its shape; what it does to another one than its own, nothing has measured."""
    try:
        trained = {name: noted["model"][name] for name in ("dtype", "fingerprint")}
        settings = noted["model"].get("settings", {})  # earlier versions noted none
    except (TypeError, KeyError):
        return
    base = model.get_base_model()
    if any(parameter.is_meta for parameter in base.parameters()):
        return  # offloaded weights have no values to compare
    now = base_settings(base)
    dtypes = {trained["dtype"], now["dtype"]}
    comparable = len(dtypes) == 1 or str(torch.float16) not in dtypes
    other_weights = comparable and now["fingerprint"] != trained["fingerprint"]
    if other_weights or _disagree(settings, now["settings"]):
        name = model.active_peft_config.base_model_name_or_path
        logger.warning(
            "adapter_dir: %s was trained on another model of the same shape%s, whose weights or settings (rope's, say) "
            "differ from this one's; what it does here is unknown",
            folder,
            f" ({name})" if name else "",
        )


def _disagree(a, b) -> bool:
    """Whether two settings differ in what both name; releases of transformers name more and less."""
    if isinstance(a, dict) and isinstance(b, dict):
        return any(_disagree(a[key], b[key]) for key in a.keys() & b.keys())
    return a != b


def _stored_config(folder: Path) -> peft.PeftConfig:
    try:
        config = peft.PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        file = folder / "adapter_config.json"
        raise InputError(f"adapter_dir: {file} cannot be read ({error}); copy it again") from error
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise InputError(
            f"adapter_dir: {folder} holds a {_method(config)} adapter, which puts tokens in front of the prompt; load "
            "it with peft.PeftModel.from_pretrained"
        )
    config.inference_mode = True
    return config
