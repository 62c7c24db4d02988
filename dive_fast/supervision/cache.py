"""Teacher results on disk: one safetensors file per report, named by all that determines its content.

The key is a hash of the model's weights, of every token id the teacher saw (so of prompt, demonstrations, report and
tokenizer), of the images' pixels and of what was asked for. A changed input is therefore a different file, never a
stale hit; a damaged file fails its checksum and counts as absent.
"""

import hashlib
import json
import logging
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dive_fast.errors import InputError

FORMAT = "dive_fast teacher 2"

logger = logging.getLogger(__name__)


def content_key(parts: Mapping[str, str | torch.Tensor]) -> str:
    """sha256 over named strings and tensors."""
    digest = hashlib.sha256(FORMAT.encode())
    for name in sorted(parts):
        value = parts[name]
        data = value.encode() if isinstance(value, str) else tensor_bytes(value)
        shape = "" if isinstance(value, str) else f"{tuple(value.shape)} {value.dtype}"
        digest.update(f"{name} {shape} ".encode() + struct.pack("<q", len(data)) + data)
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The values as bytes, any dtype, on any device."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class TensorCache:
    """A folder of named tensor dictionaries; safe for several processes that write the same entries.

    Raises:
        InputError: the folder cannot be made, or (from `store`) not be written.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cache_dir: {self.folder} cannot be used as a folder ({error.strerror}); name another"
            ) from error

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def load(self, key: str) -> dict[str, torch.Tensor] | None:
        """The entry, or None where there is none that can be trusted."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            logger.warning("teacher cache: %s is damaged (%s); it is computed again", path, error)
            return None
        if metadata.get("format") != FORMAT or metadata.get("key") != key or metadata.get("sum") != _checksum(tensors):
            logger.warning("teacher cache: %s is not what its name says; it is computed again", path)
            return None
        return tensors

    def store(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write an entry whole or not at all."""
        path = self.path(key)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, {"format": FORMAT, "key": key, "sum": _checksum(tensors)})
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"cache_dir: {self.folder} cannot be written ({error}); free disk space or name another folder. "
                "What it holds already stays valid"
            ) from error
        finally:
            with suppress(OSError):  # it is gone after success
                temporary.unlink()


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(json.dumps([name, list(tensors[name].shape), str(tensors[name].dtype)]).encode())
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()
