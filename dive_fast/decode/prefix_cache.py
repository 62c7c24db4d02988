"""Keys and values of prompt prefixes that were run before, for prompts that begin with the same tokens.

L layers, H key/value heads, E head size.
"""

import hashlib
import itertools
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from dive_fast.errors import InputError
from dive_fast.models.writes import write_count

BLOCK = 16
"""Tokens that are reused together: prompts that share fewer share nothing."""

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes
_numbers = WeakIdKeyDictionary()
_count = itertools.count()


def identity(thing) -> int:
    """A number of the object's own, which no other object ever has."""
    if thing not in _numbers:
        _numbers[thing] = next(_count)
    return _numbers[thing]


def version_of(parameters: Sequence[nn.Parameter]) -> list[tuple]:
    """Differs after anything that torch records as a change: load_state_dict, a conversion, an optimiser's step unless
    the optimiser is fused."""
    return [(identity(p), write_count(p), p.data_ptr(), str(p.dtype)) for p in parameters]


@torch.no_grad()
def digest_of(parameters: Sequence[nn.Parameter]) -> list[int]:
    """A number per parameter that differs after any change of its values; reads all of them."""
    digests = []
    for parameter in parameters:
        words = parameter.detach().reshape(-1).view(_WORDS[parameter.element_size()]).long()
        # Odd factors, so that no change of one word is lost, and different ones, so that words cannot be exchanged.
        digests.append((words * (2 * torch.arange(len(words), device=words.device) + 1)).sum())
    return [int(digest) for digest in digests]


def chain(root: bytes, *tokens: Sequence[int]) -> list[bytes]:
    """A key for each whole block of a prompt, which stands for everything up to its end.

    Args:
        root: what keys and values depend on besides the tokens.
        tokens: sequences with an entry per token.
    """
    keys, key = [], root
    for start in range(0, len(tokens[0]) // BLOCK * BLOCK, BLOCK):
        digest = hashlib.blake2b(key, digest_size=24)
        for values in tokens:
            digest.update(array("q", values[start : start + BLOCK]))
        key = digest.digest()
        keys.append(key)
    return keys


@dataclass(frozen=True)
class Block:
    """Keys and values [L, 2, H, BLOCK, E] of some tokens, and how far rope positions behind them run ahead."""

    states: torch.Tensor
    rope_delta: int


class PrefixCache:
    """Prompt prefixes for `dive_fast.generate(prefix_cache=...)`, across its rows and calls.

    A prefix is found again for the same model with the same weights and, unless its adapters' scope is "response", for
    the same adapters with the same weights. After a change of the model's own weights that torch does not record
    (writing to `parameter.data`, a fused optimiser's step) call `clear()`. Threads may share a cache.

    Args:
        max_bytes: of keys and values; the longest unused leave first.

    Raises:
        InputError: max_bytes is no positive whole number.
    """

    def __init__(self, max_bytes: int):
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
            raise InputError(f"max_bytes: expected a whole number >= 1, got {max_bytes!r}")
        self.max_bytes = max_bytes
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        return self._nbytes

    def __len__(self) -> int:
        """Blocks held, of 16 tokens each."""
        return len(self._blocks)

    def clear(self) -> None:
        with self._lock:
            self._blocks.clear()
            self._nbytes = 0

    def find(self, keys: Sequence[bytes]) -> list[Block]:
        """The blocks of the longest prefix that is there."""
        with self._lock:
            found = list(itertools.takewhile(lambda block: block is not None, map(self._blocks.get, keys)))
            # The first block is the most recent one, so that a prefix is never without its beginning.
            for key in reversed(keys[: len(found)]):
                self._blocks.move_to_end(key)
            return found

    def store(self, keys: Sequence[bytes], blocks: Sequence[Block]) -> None:
        """Add blocks of one prefix, in its order."""
        with self._lock:
            for key, block in reversed(list(zip(keys, blocks, strict=True))):
                if key not in self._blocks:
                    self._blocks[key] = block
                    self._nbytes += block.states.nbytes
                self._blocks.move_to_end(key)
            while self._nbytes > self.max_bytes:
                self._nbytes -= self._blocks.popitem(last=False)[1].states.nbytes
