"""Steered generation: `generate`, whatever engine runs it."""

from dive_fast.decode.generate import GenerateOutput, generate

__all__ = ["GenerateOutput", "generate"]
