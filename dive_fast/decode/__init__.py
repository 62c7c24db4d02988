"""Steered generation: `generate`, whatever engine runs it."""

from dive_fast.decode.generate import GenerateOutput, generate
from dive_fast.decode.prefix_cache import PrefixCache

__all__ = ["GenerateOutput", "PrefixCache", "generate"]
