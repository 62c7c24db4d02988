"""`dive_fast.generate`: reports from prompts, through transformers' `generate` with the steering inside.

B batch rows, T prompt tokens.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dive_fast.data import to_records
from dive_fast.data.encoding import ReportEncoder
from dive_fast.data.record import Record
from dive_fast.errors import InputError
from dive_fast.models.spec import text_config_of

ENGINES = ("transformers",)


@dataclass
class GenerateOutput:
    """What `generate` returns; one entry per row, in the order of the inputs.

    Attributes:
        sequences: 1-D int64 tensors on the CPU: the new tokens only, no padding, EOS included where it was produced.
        texts: the decoded sequences without special tokens; None without a processor.
        finish_reasons: "eos", or "length" where `max_new_tokens` ended the row.
        stats: engine, rows, prompt_tokens, new_tokens, seconds, tokens_per_second (new tokens over wall time,
            prefill included).
    """

    sequences: list[torch.Tensor]
    texts: list[str] | None
    finish_reasons: list[str]
    stats: dict


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
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    streamer=None,
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
        engine: None (the best that applies) or "transformers".
        adapter_names: one adapter name per row, "__base__" for none (PEFT's convention).
        temperature: 0 is greedy; otherwise the softmax temperature of sampling.
        top_k, top_p: keep the k most likely tokens (0: all), the smallest set with probability >= p; sampling only.
        repetition_penalty: > 0; 1 changes nothing.
        seed: of the sampling; None draws on.
        streamer: a transformers streamer, for a single row.
        batch_size: rows run together where records or prompts are given.
        demonstrations: per row, the demonstrations in its context (the k-shot teacher).

    Raises:
        InputError: an argument out of range; a prompt that leaves no room for `max_new_tokens` in the model's context;
            prompts without a processor.
    """
    if engine not in (None, *ENGINES):
        raise InputError(f"engine: expected None or {', '.join(map(repr, ENGINES))}, got {engine!r}")
    options = _options(max_new_tokens, min_new_tokens, temperature, top_k, top_p, repetition_penalty)
    processor = getattr(model, "processor", None) if processor is None else processor
    context = text_config_of(_base(model)).max_position_embeddings
    encoder = None if processor is None else ReportEncoder(processor, context_length=context)
    batches, order = _batches(inputs, encoder, batch_size, demonstrations)
    rows = len(order)
    if adapter_names is not None and not hasattr(model, "peft_config"):
        raise InputError("adapter_names: the model carries no adapters; load one, or leave adapter_names out")
    if adapter_names is not None and len(adapter_names) != rows:
        raise InputError(f"adapter_names: expected one name per row ({rows}), got {len(adapter_names)}")
    if streamer is not None and rows != 1:
        raise InputError(f"streamer: it shows one row, got {rows}; generate without it or row by row")
    if seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise InputError(f"seed: expected a whole number from 0 to 2**63 - 1, got {seed!r}")
        torch.manual_seed(seed)
    eos = _eos_ids(model, encoder)
    was_training = model.training
    model.eval()
    start, found, prompt_tokens, done = time.perf_counter(), [], 0, 0
    try:
        for batch in batches:
            count = batch["input_ids"].shape[0]
            names = None if adapter_names is None else [adapter_names[i] for i in order[done : done + count]]
            prompt_tokens += _check_room(batch, context, max_new_tokens)
            found += _run(model, batch, options, eos, names, streamer, encoder)
            done += count
    finally:
        model.train(was_training)
    seconds = time.perf_counter() - start
    sequences: list[torch.Tensor] = [torch.empty(0, dtype=torch.long)] * rows
    for position, sequence in zip(order, found, strict=True):
        sequences[position] = sequence
    new_tokens = sum(len(s) for s in sequences)
    return GenerateOutput(
        sequences,
        None if encoder is None else encoder.tokenizer.batch_decode(sequences, skip_special_tokens=True),
        ["eos" if len(s) and int(s[-1]) in eos else "length" for s in sequences],
        {
            "engine": "transformers",
            "rows": rows,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "seconds": seconds,
            "tokens_per_second": new_tokens / seconds,
        },
    )


def _options(max_new_tokens, min_new_tokens, temperature, top_k, top_p, repetition_penalty) -> dict:
    for name, value, low in (
        ("max_new_tokens", max_new_tokens, 1),
        ("min_new_tokens", min_new_tokens, 0),
        ("top_k", top_k, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise InputError(f"{name}: expected a whole number >= {low}, got {value!r}")
    if min_new_tokens > max_new_tokens:
        raise InputError(f"min_new_tokens: {min_new_tokens} is more than max_new_tokens={max_new_tokens}")
    for name, value in (("temperature", temperature), ("top_p", top_p), ("repetition_penalty", repetition_penalty)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{name}: expected a number, got {value!r}")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature: expected a number >= 0 (0 is greedy), got {temperature!r}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p: expected a number in (0, 1], got {top_p!r}")
    if not 0 < repetition_penalty < float("inf"):
        raise InputError(f"repetition_penalty: expected a number > 0, got {repetition_penalty!r}")
    if temperature == 0 and (top_k or top_p < 1):
        raise InputError("top_k, top_p: they shape sampling, and temperature=0 is greedy; give a temperature > 0")
    options = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens or None,
        "repetition_penalty": repetition_penalty,
        "do_sample": temperature > 0,
        "num_beams": 1,
    }
    # The model's own generation config must not add what was not asked for.
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if temperature > 0 else {}
    return options | {"temperature": None, "top_k": None, "top_p": None} | sampling


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


@torch.no_grad()
def _run(model, batch, options, eos, adapter_names, streamer, encoder) -> list[torch.Tensor]:
    device = next(model.parameters()).device
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    extra = {} if adapter_names is None else {"adapter_names": adapter_names}
    if streamer is not None:
        extra["streamer"] = streamer
    pad = sorted(eos)[0] if eos else 0
    if encoder is not None:
        pad = encoder.pad_token_id
    options = options | {"eos_token_id": sorted(eos) or None, "pad_token_id": pad}
    out = model.generate(**batch, **options, **extra)
    new = out[:, batch["input_ids"].shape[1] :].cpu()
    return [_until_eos(row, eos) for row in new]


def _until_eos(row: torch.Tensor, eos: set[int]) -> torch.Tensor:
    """The row up to and including its first EOS; what follows is padding."""
    ends = torch.isin(row, torch.tensor(sorted(eos), dtype=row.dtype)).nonzero() if eos else []
    return row[: int(ends[0]) + 1].clone() if len(ends) else row.clone()


def _eos_ids(model, encoder: ReportEncoder | None) -> set[int]:
    """The model's own EOS ids and the tokenizer's, with which reports were trained to end."""
    configured = getattr(_base(model), "generation_config", None)
    ids = getattr(configured, "eos_token_id", None)
    found = set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    if encoder is not None:
        found.add(encoder.tokenizer.eos_token_id)
    return found


def _base(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model
