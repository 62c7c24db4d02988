"""The tensors of a checkpoint, by name, each in the memory of its file until it is used."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from dive_fast.errors import InputError

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_weights(name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(key, tensor) of every weight of a folder or hub id, safetensors or pytorch_model*.bin, in one file or many.

    Tensors lie in the mapped file: memory is taken for what is read, once.

    Raises:
        InputError: no such file, a shard that is missing or damaged, a key in two shards.
    """
    found = next((path for path in map(lambda file: _file(name, file), FILES) if path is not None), None)
    if found is None:
        raise InputError(f"model: {name!r} has no weights; expected {' or '.join(FILES)} in it")
    shards = [found]
    if found.suffix == ".json":
        shards = [_shard(name, file, found.name) for file in _shard_names(found)]
    seen: set[str] = set()
    for shard in shards:
        for key, tensor in _read(shard):
            if key in seen:
                raise InputError(f"model: {name!r} holds {key} twice, a second time in {shard.name}")
            seen.add(key)
            yield key, tensor


def _file(name: str, file: str) -> Path | None:
    path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)


def _shard_names(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"model: {index} cannot be read ({error!r}); copy it again") from error


def _shard(name: str, file: str, index: str) -> Path:
    path = _file(name, file)
    if path is None:
        raise InputError(f"model: {name!r} lacks the shard {file}, which its {index} names; copy it again")
    return path


def _read(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - it is no mapping
                    yield key, file.get_tensor(key)
        else:
            yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"model: {path} is damaged, cut short or no file of weights ({why}); copy it again") from error
