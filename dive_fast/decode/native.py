"""Decoding by the compiled engine: transformers runs the prompt, the engine everything behind it.

The prompt is run without its last token, whatever the scope of the adapters: that token is the first position whose
next token belongs to the response, so it is the first step of the engine. B batch rows, P prompt columns.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dive_fast import native
from dive_fast.decode.plan import Plan, Unsupported, build_plan, dive_model_of
from dive_fast.errors import InputError
from dive_fast.models.hidden import unwrapped
from dive_fast.models.prefix import Prefix, run_prefix
from dive_fast.steering import DiveModel

MAX_ROWS = 64
"""Rows of one step; more wait for their turn."""

# Inputs with one entry per prompt token.
_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
# What would change the prompt's positions or embeddings behind the engine's back.
_UNKNOWN = ("inputs_embeds", "position_ids", "past_key_values", "cache_position", "decoder_input_ids")


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the fields are those of csrc/engine/sampler.h. Row i draws from stream i of the seed."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One row's outcome: its new tokens, their log-probabilities (empty if not asked for), "eos" or "length"."""

    tokens: list[int]
    log_probs: list[float]
    finish: str


class NativeDecoder:
    """A model that the engine can run, with the adapters that act now.

    Args:
        adapter_names: every row's adapter, "__base__" for none; None: the active ones on every row.

    Raises:
        Unsupported: the engine cannot run it; says why.
        InputError: no such adapter.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, adapter_names: Sequence[str] | None = None):
        self.model = model
        self.dive: DiveModel | None = dive_model_of(model)
        self.acting: list[str] = []
        if self.dive is not None:
            with self.dive.rows_steered_by(adapter_names):
                self.acting = self.dive.acting_adapters()
        self.scopes = {name: self.dive.peft_config[name].scope for name in self.acting}
        steps = tuple(name for name in self.acting if self.scopes[name] != "prompt")
        self.plan: Plan = build_plan(model, steps)
        try:
            self.extension = native.load()
        except InputError as error:
            raise Unsupported(str(error)) from error
        self.compiled = self.extension.engine.Plan(self.plan.values, self.plan.kept)
        text = unwrapped(model).config
        self.image_tokens = {
            value
            for name in ("image_token_id", "image_token_index", "video_token_id")
            if isinstance(value := getattr(text, name, None), int)
        }

    def check(self, batch: dict) -> None:
        """Unsupported where the engine cannot run this batch."""
        for name, value in batch.items():
            if name in _UNKNOWN or not isinstance(value, torch.Tensor):
                raise Unsupported(f"inputs: it does not know what {name!r} would mean behind the prompt")
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if mask is not None and (mask.dim() != 2 or bool((mask[:, 1:] < mask[:, :-1]).any())):
            raise Unsupported("inputs: the attention_mask has holes behind a row's first token")
        if any(bool((ids[:, -1] == token).any()) for token in self.image_tokens):
            raise Unsupported("inputs: a prompt ends in an image")
        vocabulary = self.plan.values["vocabulary"]
        last = ids[:, -1]
        if bool(((last < 0) | (last >= vocabulary)).any()):
            raise InputError(
                f"inputs: input_ids holds {int(last.max())}, the model's vocabulary has {vocabulary} tokens"
            )

    def run(
        self,
        batches: Iterable[tuple[dict, Sequence[int], Sequence[str] | None]],
        *,
        max_rows: int,
        sampling: Sampling,
        eos: Iterable[int],
        min_new_tokens: int,
        max_new_tokens: int,
        log_probs: bool = False,
        on_token: Callable[[int, int], None] | None = None,
        threads: int | None = None,
        isa: str | None = None,
    ) -> dict[int, Row]:
        """Row number -> its outcome.

        Args:
            batches: (a processor's output for left-padded prompts, the rows' numbers, their adapter names) each; taken
                one by one, whenever a row has become free.
            on_token: called with (row number, token) after every token.
            threads: the most to use; None takes as many as torch does.
        """
        session = self.session(max_rows, threads, isa)
        numbers: list[int] = []
        request = {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "seed": sampling.seed,
            "eos": sorted(token for token in eos if 0 <= token < self.plan.values["vocabulary"]),
            "min_new_tokens": min_new_tokens,
            "max_new_tokens": max_new_tokens,
            "log_probs": log_probs,
        }
        report = None if on_token is None else lambda index, token: on_token(numbers[index], token)
        for batch, rows, names in batches:
            numbers += rows
            self.submit(session, batch, names, [request | {"stream": row} for row in rows])
            session.run(on_token=report, until_free=1)
        session.run(on_token=report, until_free=0)
        return {number: Row(*session.take(index)) for index, number in enumerate(numbers)}

    def session(self, max_rows: int, threads: int | None = None, isa: str | None = None):
        """An empty session of the engine."""
        return self.extension.engine.Session(
            plan=self.compiled,
            max_rows=min(max_rows, MAX_ROWS),
            threads=threads or torch.get_num_threads(),
            isa=isa or self.extension.cpu.kernel_levels()[-1],
        )

    @torch.no_grad()
    def submit(self, session, batch: dict, names: Sequence[str] | None, requests: Sequence[dict]) -> None:
        """Run the batch's prompts and hand one request per row to the session."""
        self.check(batch)
        ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        prefix = self._prefill({**batch, "attention_mask": mask}, names)
        vocabulary = self.plan.values["vocabulary"]
        for row, request in enumerate(requests):
            first = ids.shape[1] - int(mask[row].sum())
            prompt = ids[row, first:].tolist()
            # Placeholder ids beyond the head's rows stand for images; no logit belongs to them.
            seen = [token for token in prompt[:-1] if token < vocabulary] + prompt[-1:]
            offset = 0 if prefix is None or prefix.rope_deltas is None else int(prefix.rope_deltas[row])
            session.submit(
                prompt=seen,
                prefilled=len(prompt) - 1,
                rope_offset=offset,
                adapters=self._adapters_of(None if names is None else names[row]),
                layers=_layers_of(prefix, row, first) if len(prompt) > 1 else [],
                **{"forced": [], "forced_logits": 0} | request,
            )

    def _adapters_of(self, name: str | None) -> list[int]:
        """The places in the plan of what steers a row."""
        index = self.plan.adapter_index
        return list(index.values()) if name is None else [index[name]] if name in index else []

    def _prefill(self, batch: dict, names) -> Prefix | None:
        """Keys and values of all but the last column; None where there is no other."""
        length = batch["input_ids"].shape[1]
        if length == 1:
            return None
        head = {k: v[:, :-1] if k in _PER_TOKEN else v for k, v in batch.items()}
        if self.dive is None:
            prefix = run_prefix(self.model, head)
        elif set(self.scopes.values()) <= {"response"}:
            with self.dive.unsteered():
                prefix = run_prefix(self.model, head)
        else:
            with self.dive.rows_steered_by(names), self.dive.generating(length, batch["attention_mask"]):
                prefix = run_prefix(self.model, head)
        return Prefix(
            tuple((self._ready(keys), self._ready(values)) for keys, values in prefix.layers),
            prefix.mask,
            prefix.rope_deltas,
        )

    def _ready(self, states: torch.Tensor) -> torch.Tensor:
        states = states.to(self.plan.cache_dtype)
        return states if states.stride(-1) == 1 else states.contiguous()


def _layers_of(prefix: Prefix, row: int, first: int) -> list[tuple]:
    """(address of keys, of values, strides over heads and positions of both) per layer, from a row's first token on."""
    found = []
    for keys, values in prefix.layers:
        address = [x.data_ptr() + (row * x.stride(0) + first * x.stride(2)) * x.element_size() for x in (keys, values)]
        found.append((*address, keys.stride(1), keys.stride(2), values.stride(1), values.stride(2)))
    return found
