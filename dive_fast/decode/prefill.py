"""Prompts through the transformers model: keys and values of all but each prompt's last token.

That token is the first position whose next one belongs to the response, so it is the first step of the engine, whatever
the scope of the adapters. B batch rows, P prompt columns, L layers, H key/value heads, E head size.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from dive_fast.decode.prefix_cache import BLOCK, Block, PrefixCache, chain, digest_of, identity, version_of
from dive_fast.models.hidden import unwrapped
from dive_fast.models.prefix import Prefix, extend_prefix, run_prefix
from dive_fast.steering import DiveModel

PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""Inputs with one entry per prompt token."""


@dataclass(frozen=True)
class Prefilled:
    """One prompt's keys and values [H, count, E], a pair per layer, and how far rope positions run ahead behind it."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    rope_delta: int = 0


@dataclass
class _Row:
    """A prompt without its last token: [tokens, token types, ...] and the keys of its blocks."""

    tokens: list[list[int]]
    keys: list[bytes]
    least: int  # blocks of the shortest prefix that can be gone on from
    name: str | None
    found: list[Block]

    @property
    def length(self) -> int:
        return len(self.tokens[0])


class Prefill:
    """Runs prompts of one model with the adapters that act now.

    Args:
        scopes: of the acting adapters.
        image_tokens: ids that stand for images.
    """

    def __init__(self, model: nn.Module, dive: DiveModel | None, scopes: dict[str, str], image_tokens: set[int]):
        self.model, self.dive, self.scopes, self.image_tokens = model, dive, scopes, image_tokens
        self.reused = 0

    @torch.no_grad()
    def run(self, batch: dict, names: Sequence[str] | None, cache: PrefixCache | None) -> list[Prefilled | None]:
        """Every row's; None for prompts of a single token.

        Args:
            batch: a processor's output for left-padded prompts, with an attention_mask.
            names: every row's adapter; None: the active ones.
        """
        if cache is not None and batch["input_ids"].shape[1] > BLOCK:
            return self._with_cache(batch, names, cache)
        prefix = self._whole(batch, names)
        counts = (batch["attention_mask"].sum(dim=1) - 1).tolist()
        return [self._row_of(prefix, row, count) for row, count in enumerate(counts)]

    def _whole(self, batch: dict, names) -> Prefix | None:
        if batch["input_ids"].shape[1] == 1:
            return None
        head = {k: v[:, :-1] if k in PER_TOKEN else v for k, v in batch.items()}
        with self._steered(names, head["attention_mask"]):
            return run_prefix(self.model, head)

    @staticmethod
    def _row_of(prefix: Prefix | None, row: int, count: int) -> Prefilled | None:
        """The last `count` columns of a row."""
        if count == 0:
            return None
        delta = 0 if prefix.rope_deltas is None else int(prefix.rope_deltas[row])
        first = prefix.mask.shape[1] - count
        return Prefilled([(k[row, :, first:], v[row, :, first:]) for k, v in prefix.layers], delta)

    @contextmanager
    def _steered(self, names: Sequence[str] | None, mask: torch.Tensor):
        """Passes over prompts of these columns, none of which belongs to the response."""
        if self.dive is None:
            yield
        elif set(self.scopes.values()) <= {"response"}:
            with self.dive.unsteered():
                yield
        else:
            with self.dive.rows_steered_by(names), self.dive.generating(mask.shape[1] + 1, mask):
                yield

    # -- with a cache ------------------------------------------------------------------------------------------------

    def _with_cache(self, batch: dict, names, cache: PrefixCache) -> list[Prefilled | None]:
        rows = self._rows(batch, names)
        images = any(name not in PER_TOKEN for name in batch) or any(any(v) for row in rows for v in row.tokens[1:])
        if not images:
            self._run_shared(rows, cache)
        for row in rows:
            row.found = cache.find(row.keys)
            if len(row.found) < row.least:
                row.found = []
        if images and not all(row.found for row in rows):
            # Which pixels belong to which row is the model's business, so all rows run.
            prefix = self._whole(batch, names)
            done = [self._row_of(prefix, i, row.length) for i, row in enumerate(rows)]
        else:
            self.reused += sum(len(row.found) for row in rows) * BLOCK
            done = self._run_rest(rows)
        for row, prefilled in zip(rows, done, strict=True):
            if prefilled is not None:
                self._store(row, prefilled, cache)
        return done

    def _rows(self, batch: dict, names) -> list[_Row]:
        mask = batch["attention_mask"]
        roots = self._roots(batch, names)
        aligned = [batch[name] for name in PER_TOKEN if name in batch and name != "attention_mask"]
        rows = []
        for i, root in enumerate(roots):
            first = mask.shape[1] - int(mask[i].sum())
            tokens = [values[i, first:-1].tolist() for values in aligned]
            last = max((p for p, token in enumerate(tokens[0]) if token in self.image_tokens), default=-1)
            name = None if names is None else names[i]
            rows.append(_Row(tokens, chain(root, *tokens), -(-(last + 1) // BLOCK), name, []))
        return rows

    def _roots(self, batch: dict, names) -> list[bytes]:
        """Per row, a digest of what its keys and values depend on besides its tokens."""
        base = unwrapped(self.model)
        weights = [p for name, p in base.named_parameters() if "dive_" not in name]
        common = hashlib.blake2b(repr((identity(base), version_of(weights))).encode())
        pixels = {name: value for name, value in batch.items() if name not in PER_TOKEN}
        for name, value in sorted(pixels.items()):
            common.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            common.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        if pixels:
            # The pixels of a row are found by the image tokens of the rows before it.
            tokens = torch.tensor(sorted(self.image_tokens), device=batch["input_ids"].device)
            images = torch.isin(batch["input_ids"], tokens).sum(dim=1).tolist()
        roots = []
        # Whole adapters are read for these.
        adapters = {name: self._adapter(name) for name, scope in self.scopes.items() if scope in ("prompt", "all")}
        for row in range(len(batch["input_ids"])):
            acting = self.scopes if names is None else [names[row]]
            own = common.copy()
            own.update(repr([adapters[name] for name in acting if name in adapters]).encode())
            if pixels:
                own.update(repr((row, images)).encode())
            roots.append(own.digest())
        return roots

    def _adapter(self, name: str) -> tuple:
        parameters = [p for n, p in self.dive.named_parameters() if "dive_" in n and name in n.split(".")]
        config = self.dive.peft_config[name].to_dict()
        return name, json.dumps(config, sort_keys=True, default=str), version_of(parameters), digest_of(parameters)

    def _run_shared(self, rows: list[_Row], cache: PrefixCache) -> None:
        """Run what several rows begin with, and no earlier call has run, once."""
        counts = Counter(key for row in rows for key in row.keys)
        longest: dict[bytes, _Row] = {}
        for row in rows:
            shared = sum(counts[key] > 1 for key in row.keys)
            found = cache.find(row.keys)
            if shared > len(found):
                tokens = [values[: shared * BLOCK] for values in row.tokens]
                longest[row.keys[shared - 1]] = _Row(tokens, row.keys[:shared], 0, row.name, found)
        within = {key for row in longest.values() for key in row.keys[:-1]}
        parts = [row for key, row in longest.items() if key not in within]
        for row, prefilled in zip(parts, self._run_rest(parts), strict=True):
            self._store(row, prefilled, cache)
            self.reused -= row.length - len(row.found) * BLOCK

    def _run_rest(self, rows: list[_Row]) -> list[Prefilled | None]:
        """What follows each row's found prefix; rows with prefixes of one length run together."""
        done: list[Prefilled | None] = [None] * len(rows)
        for count in {len(row.found) for row in rows if row.length}:
            group = [i for i, row in enumerate(rows) if len(row.found) == count and row.length]
            for i, prefilled in zip(group, self._run_group([rows[i] for i in group], count), strict=True):
                done[i] = prefilled
        return done

    def _run_group(self, rows: list[_Row], count: int) -> list[Prefilled]:
        deltas = [row.found[-1].rope_delta if count else 0 for row in rows]
        prefix, start, device = None, count * BLOCK, next(self.model.parameters()).device
        if count:
            states = torch.stack([torch.cat([block.states for block in row.found], dim=3) for row in rows])
            layers = tuple((states[:, layer, 0], states[:, layer, 1]) for layer in range(states.shape[1]))
            mask = torch.ones(len(rows), start, dtype=torch.long, device=device)
            prefix = Prefix(layers, mask, torch.tensor(deltas, device=device)[:, None])
        rests = [torch.tensor(row.tokens[0][start:], dtype=torch.long, device=device) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(rests, batch_first=True)
        if ids.shape[1]:
            lengths = torch.tensor([len(r) for r in rests], device=device)
            rest = torch.arange(ids.shape[1], device=device) < lengths[:, None]
            mask = torch.cat([torch.ones(len(rows), start, dtype=torch.long, device=device), rest.long()], dim=1)
            names = None if rows[0].name is None else [row.name for row in rows]
            with self._steered(names, mask):
                prefix = extend_prefix(self.model, prefix, ids, rest.long())
        return [
            Prefilled([(k[i, :, : row.length], v[i, :, : row.length]) for k, v in prefix.layers], deltas[i])
            for i, row in enumerate(rows)
        ]

    @staticmethod
    def _store(row: _Row, prefilled: Prefilled, cache: PrefixCache) -> None:
        have, whole = len(row.found), len(row.keys)
        blocks = list(row.found)
        if whole > have:
            start, end = have * BLOCK, whole * BLOCK
            new = torch.stack([torch.stack([k[:, start:end], v[:, start:end]]) for k, v in prefilled.layers])
            blocks += [Block(part.clone(), prefilled.rope_delta) for part in new.split(BLOCK, dim=3)]
        cache.store(row.keys, blocks)
