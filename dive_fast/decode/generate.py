"""`dive_fast.generate`: reports from prompts, by the compiled engine or by transformers' `generate`.

B batch rows, T prompt tokens.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from dive_fast.data import to_records
from dive_fast.data.encoding import ReportEncoder
from dive_fast.data.record import Record
from dive_fast.decode.hf import run_batch, transformers_options
from dive_fast.decode.native import NativeDecoder, Sampling
from dive_fast.decode.plan import Unsupported
from dive_fast.errors import InputError
from dive_fast.models.hidden import unwrapped
from dive_fast.models.spec import text_config_of

ENGINES = ("native", "transformers")


@dataclass
class GenerateOutput:
    """What `generate` returns; one entry per row, in the order of the inputs.

    Attributes:
        sequences: 1-D int64 tensors on the CPU: the new tokens only, no padding, EOS included where it was produced.
        texts: the decoded sequences without special tokens; None without a processor.
        finish_reasons: "eos", or "length" where `max_new_tokens` ended the row.
        stats: engine ("native" or "transformers"), rows, prompt_tokens, new_tokens, seconds, tokens_per_second (new
            tokens over wall time, prefill included); not_native: why engine=None did not take the native one.
        log_probs: float32, one per token of `sequences`, if asked for.
    """

    sequences: list[torch.Tensor]
    texts: list[str] | None
    finish_reasons: list[str]
    stats: dict
    log_probs: list[torch.Tensor] | None = None


def generate(
    model: nn.Module,
    inputs,
    *,
    processor=None,
    max_new_tokens: int = 256,
    min_new_tokens: int = 0,
    engine: str | None = None,
    adapter_names: Sequence[str] | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    streamer=None,
    log_probs: bool = False,
    batch_size: int = 8,
    demonstrations: Sequence[Sequence[Record]] | None = None,
) -> GenerateOutput:
    """Generate a report for every input.

    Args:
        model: a transformers model or a PEFT model, steered or not.
        inputs: a processor's output (a mapping with input_ids, attention_mask, pixel_values, ...; left-padded), or a
            list of records, or of prompts as plain text, which go through the chat template; one of either also alone.
        processor: needed for records and prompts, and for `texts`; a model of `dive_fast.load(name, ...)` has its own.
        max_new_tokens, min_new_tokens: bounds on the new tokens, EOS included.
        engine: "native" (the compiled engine: CPU, the decoder families it knows), "transformers" (anything), or None:
            the first where it applies, else the second.
        adapter_names: one adapter name per row, "__base__" for none (PEFT's convention).
        temperature: 0 is greedy; otherwise the softmax temperature of sampling.
        top_k, top_p, min_p: keep the k most likely tokens (0: all); the fewest that reach probability top_p; those with
            at least min_p times the probability of the likeliest. Sampling only, in this order.
        repetition_penalty: > 0; 1 changes nothing.
        seed: of the sampling; None draws on. With the native engine a row's draws depend on the seed and its place
            among the inputs alone, so not on batch_size.
        streamer: a transformers streamer, for a single row.
        log_probs: also return every token's log-probability under the model's logits, before anything shapes them.
        batch_size: rows run together where records or prompts are given.
        demonstrations: per row, the demonstrations in its context (the k-shot teacher).

    Raises:
        InputError: an argument out of range; a prompt that leaves no room for `max_new_tokens` in the model's context;
            prompts without a processor; engine="native" for what that engine cannot run, with the reason.
    """
    if engine not in (None, *ENGINES):
        raise InputError(f"engine: expected None or {', '.join(map(repr, ENGINES))}, got {engine!r}")
    _check_options(max_new_tokens, min_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    processor = getattr(model, "processor", None) if processor is None else processor
    context = text_config_of(unwrapped(model)).max_position_embeddings
    encoder = None if processor is None else ReportEncoder(processor, context_length=context)
    batches, order = _batches(inputs, encoder, batch_size, demonstrations)
    rows = len(order)
    _check_rows(model, rows, adapter_names, streamer, seed)
    call = _Call(
        model, encoder, sampling, min_new_tokens, max_new_tokens, context, adapter_names, streamer, log_probs, order
    )
    was_training = model.training
    model.eval()
    start = time.perf_counter()
    try:
        decoder, reason = _native_decoder(engine, call, inputs)
        call.seed(seed)
        if decoder is None:
            found = _by_transformers(call, batches)
        else:
            found = _by_engine(call, decoder, batches, rows if isinstance(inputs, Mapping) else batch_size)
    finally:
        model.train(was_training)
    seconds = time.perf_counter() - start
    sequences, likelihoods = zip(*(found[row] for row in range(rows)), strict=True)
    new_tokens = sum(len(s) for s in sequences)
    stats = {
        "engine": "transformers" if decoder is None else "native",
        "rows": rows,
        "prompt_tokens": call.prompt_tokens,
        "new_tokens": new_tokens,
        "seconds": seconds,
        "tokens_per_second": new_tokens / seconds,
    }
    return GenerateOutput(
        list(sequences),
        None if encoder is None else encoder.tokenizer.batch_decode(list(sequences), skip_special_tokens=True),
        ["eos" if len(s) and int(s[-1]) in call.eos else "length" for s in sequences],
        stats if reason is None else stats | {"not_native": reason},
        list(likelihoods) if log_probs else None,
    )


@dataclass
class _Call:
    """One call of `generate`, after its arguments were checked."""

    model: nn.Module
    encoder: ReportEncoder | None
    sampling: Sampling
    min_new_tokens: int
    max_new_tokens: int
    context: int
    adapter_names: Sequence[str] | None
    streamer: object
    log_probs: bool
    order: list[int]
    prompt_tokens: int = 0

    def __post_init__(self):
        self.eos = _eos_ids(self.model, self.encoder)

    def seed(self, seed: int | None) -> None:
        """Without a seed the draws follow torch's generator, as everything random in a torch program does."""
        if seed is not None:
            torch.manual_seed(seed)
        elif self.sampling.temperature > 0:
            seed = int(torch.randint(2**63 - 1, ()))
        self.sampling = replace(self.sampling, seed=seed or 0)

    def batches(self, batches):
        """(batch, its rows' positions among the inputs, their adapter names), each checked for room."""
        done = 0
        for batch in batches:
            rows = self.order[done : done + batch["input_ids"].shape[0]]
            done += len(rows)
            self.prompt_tokens += _check_room(batch, self.context, self.max_new_tokens)
            names = None if self.adapter_names is None else [self.adapter_names[row] for row in rows]
            yield batch, rows, names


def _native_decoder(engine: str | None, call: _Call, inputs) -> tuple[NativeDecoder | None, str | None]:
    """(the engine's decoder, None), or (None, why it is not the engine that runs)."""
    if engine == "transformers":
        return None, None
    try:
        decoder = NativeDecoder(call.model, call.adapter_names)
        if isinstance(inputs, Mapping):
            decoder.check(inputs)
        return decoder, None
    except Unsupported as reason:
        if engine == "native":
            raise InputError(f"engine: 'native' cannot run this: {reason}. engine=None runs it anyway") from None
        return None, str(reason)


def _by_engine(call: _Call, decoder: NativeDecoder, batches, max_rows: int) -> dict[int, tuple]:
    streamer, on_token = call.streamer, None
    if streamer is not None:

        def on_token(row: int, token: int) -> None:
            streamer.put(torch.tensor([token]))

    def shown(batches):
        for batch, rows, names in batches:
            if streamer is not None:
                streamer.put(batch["input_ids"].cpu())
            yield batch, rows, names

    found = decoder.run(
        shown(call.batches(batches)),
        max_rows=max_rows,
        sampling=call.sampling,
        eos=call.eos,
        min_new_tokens=call.min_new_tokens,
        max_new_tokens=call.max_new_tokens,
        log_probs=call.log_probs,
        on_token=on_token,
    )
    if streamer is not None:
        streamer.end()
    return {
        number: (torch.tensor(row.tokens, dtype=torch.long), torch.tensor(row.log_probs))
        for number, row in found.items()
    }


def _by_transformers(call: _Call, batches) -> dict[int, tuple]:
    s = call.sampling
    options = transformers_options(
        call.max_new_tokens, call.min_new_tokens, s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty
    )
    pad = call.encoder.pad_token_id if call.encoder is not None else min(call.eos, default=0)
    found: dict[int, tuple] = {}
    for batch, rows, names in call.batches(batches):
        done = run_batch(call.model, batch, options, call.eos, pad, names, call.streamer, call.log_probs)
        found.update(zip(rows, done, strict=True))
    return found


def _check_options(max_new_tokens, min_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty) -> None:
    for name, value, low in (
        ("max_new_tokens", max_new_tokens, 1),
        ("min_new_tokens", min_new_tokens, 0),
        ("top_k", top_k, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise InputError(f"{name}: expected a whole number >= {low}, got {value!r}")
    if min_new_tokens > max_new_tokens:
        raise InputError(f"min_new_tokens: {min_new_tokens} is more than max_new_tokens={max_new_tokens}")
    numbers = {"temperature": temperature, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{name}: expected a number, got {value!r}")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature: expected a number >= 0 (0 is greedy), got {temperature!r}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p: expected a number in (0, 1], got {top_p!r}")
    if not 0 <= min_p <= 1:
        raise InputError(f"min_p: expected a number in [0, 1], got {min_p!r}")
    if not 0 < repetition_penalty < float("inf"):
        raise InputError(f"repetition_penalty: expected a number > 0, got {repetition_penalty!r}")
    if temperature == 0 and (top_k or top_p < 1 or min_p > 0):
        raise InputError(
            "top_k, top_p, min_p: they shape sampling, and temperature=0 is greedy; give a temperature > 0"
        )


def _check_rows(model, rows: int, adapter_names, streamer, seed) -> None:
    if adapter_names is not None and not hasattr(model, "peft_config"):
        raise InputError("adapter_names: the model carries no adapters; load one, or leave adapter_names out")
    if adapter_names is not None and len(adapter_names) != rows:
        raise InputError(f"adapter_names: expected one name per row ({rows}), got {len(adapter_names)}")
    if streamer is not None and rows != 1:
        raise InputError(f"streamer: it shows one row, got {rows}; generate without it or row by row")
    if seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise InputError(f"seed: expected a whole number from 0 to 2**63 - 1, got {seed!r}")


def _batches(inputs, encoder: ReportEncoder | None, batch_size: int, demonstrations):
    """(batches of model inputs, the input's position of each row as they come)."""
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs:
            raise InputError(f"inputs: a mapping needs input_ids, got {', '.join(inputs)}")
        if demonstrations is not None:
            raise InputError("demonstrations: they need records or prompts as inputs, not encoded ones")
        return [dict(inputs)], list(range(inputs["input_ids"].shape[0]))
    if encoder is None:
        raise InputError("processor: records and prompts need one; pass the model's processor or tokenizer")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size: expected a whole number >= 1, got {batch_size!r}")
    records = _prompt_records(inputs)
    shown = [()] * len(records) if demonstrations is None else list(demonstrations)
    if len(shown) != len(records):
        raise InputError(f"demonstrations: expected one list per row ({len(records)}), got {len(shown)}")
    # Rows of like length pad each other least; the sort is stable, so runs repeat.
    size = [
        len(r.prompt) + sum(len(d.prompt) + len(d.report) for d in ds) for r, ds in zip(records, shown, strict=True)
    ]
    order = sorted(range(len(records)), key=lambda i: size[i])

    def batches():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            yield encoder.prompts([records[i] for i in rows], [shown[i] for i in rows])

    return batches(), order


def _prompt_records(inputs) -> list[Record]:
    inputs = [inputs] if isinstance(inputs, str | Record) else inputs
    if not isinstance(inputs, Sequence):
        return to_records(inputs)
    if not len(inputs):
        raise InputError("inputs: nothing to generate from, the list is empty")
    for index, item in enumerate(inputs):
        if not isinstance(item, str | Record):
            raise InputError(
                f"inputs: item {index} is a {type(item).__name__}; expected dive_fast.Record objects or plain prompts"
            )
        if isinstance(item, str) and not item.strip():
            raise InputError(f"inputs: prompt {index} is empty; write what the report should be about, or leave it out")
        if isinstance(item, Record) and not (isinstance(item.prompt, str) and item.prompt.strip()):
            raise InputError(f"inputs: the prompt of record {item.id!r} is empty; write one, or leave the record out")
    return [Record(f"prompt {i}", item, "") if isinstance(item, str) else item for i, item in enumerate(inputs)]


def _check_room(batch: dict, context: int, max_new_tokens: int) -> int:
    """The batch's prompt tokens; InputError where one leaves too little room."""
    mask = batch.get("attention_mask")
    length = batch["input_ids"].shape[1]
    if mask is not None and not mask[:, -1].all():
        raise InputError("inputs: a row of input_ids ends in padding; encode with padding_side='left'")
    lengths = [length] * batch["input_ids"].shape[0] if mask is None else mask.sum(dim=1).tolist()
    if max(lengths) + max_new_tokens > context:
        raise InputError(
            f"max_new_tokens: a prompt of {max(lengths)} tokens leaves {max(context - max(lengths), 0)} of the model's "
            f"context of {context}, not {max_new_tokens}; lower max_new_tokens or shorten the prompt"
        )
    return int(sum(lengths))


def _eos_ids(model, encoder: ReportEncoder | None) -> set[int]:
    """The model's own EOS ids and the tokenizer's, with which reports were trained to end."""
    configured = getattr(unwrapped(model), "generation_config", None)
    ids = getattr(configured, "eos_token_id", None)
    found = set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    if encoder is not None:
        found.add(encoder.tokenizer.eos_token_id)
    return found
