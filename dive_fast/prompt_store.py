"""Prompts of a frozen model, run once and kept: their keys and values do not change from epoch to epoch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dive_fast.data.record import Record
from dive_fast.models.prefix import Prefix, run_prefix


class PromptStore:
    """Runs the prompts of records without gradient, and keeps their caches in host memory up to a budget.

    Args:
        memory_bytes: 0 keeps nothing. What does not fit any more is run again whenever it is needed.
    """

    def __init__(self, memory_bytes: int = 0):
        self.memory_left = memory_bytes
        self.kept: dict[str, Prefix] = {}
        self.passes = 0

    def prefix(self, model: nn.Module, records: Sequence[Record], prompts: dict) -> Prefix:
        """The prompts' caches on the model's device, in the records' order.

        Args:
            model: with nothing steering it.
            prompts: as `ReportCollator` splits them off.
        """
        if all(record.id in self.kept for record in records):
            return _left_padded([self.kept[record.id] for record in records]).to(prompts["input_ids"].device)
        self.passes += 1
        prefix = run_prefix(model, prompts)
        for row, record in enumerate(records):
            self._keep(record.id, prefix, row)
        return prefix

    def _keep(self, record_id: str, prefix: Prefix, row: int) -> None:
        tokens = int(prefix.mask[row].sum()) if self.memory_left > 0 else 0
        size = prefix.nbytes // prefix.mask.numel() * tokens
        if record_id in self.kept or not 0 < size <= self.memory_left:
            return
        one = prefix.rows(slice(row, row + 1))
        # Copies, or a view would keep the whole batch alive.
        layers = tuple(tuple(x[:, :, -tokens:].cpu().clone() for x in pair) for pair in one.layers)
        deltas = None if one.rope_deltas is None else one.rope_deltas.cpu().clone()
        self.kept[record_id] = Prefix(layers, torch.ones(1, tokens, dtype=prefix.mask.dtype), deltas)
        self.memory_left -= size


def _left_padded(prefixes: Sequence[Prefix]) -> Prefix:
    """One batch of single prompts."""
    length = max(prefix.mask.shape[1] for prefix in prefixes)

    def stacked(tensors, dim):
        sides = (0, 0) * (-dim - 1)
        return torch.cat([F.pad(x, (*sides, length - x.shape[dim], 0)) for x in tensors])

    layers = [zip(*pairs, strict=True) for pairs in zip(*(prefix.layers for prefix in prefixes), strict=True)]
    deltas = [prefix.rope_deltas for prefix in prefixes]
    return Prefix(
        tuple(tuple(stacked(x, -2) for x in pair) for pair in layers),
        stacked([prefix.mask for prefix in prefixes], -1),
        None if deltas[0] is None else torch.cat(deltas),
    )
