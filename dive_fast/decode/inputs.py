"""The inputs of `generate`: records, prompts or encoded rows, as batches of model inputs."""

from collections.abc import Mapping, Sequence

import torch

from dive_fast.data import to_records
from dive_fast.data.encoding import ReportEncoder
from dive_fast.data.record import Record
from dive_fast.decode.options import check_count
from dive_fast.errors import InputError


def batches_of(
    inputs, encoder: ReportEncoder | None, batch_size: int, demonstrations, pad: int | None, max_new_tokens: int
):
    """(batches of model inputs, the input's position of each row as they come)."""
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs:
            raise InputError(f"inputs: a mapping needs input_ids, got {', '.join(inputs)}")
        if demonstrations is not None:
            raise InputError("demonstrations: they need records or prompts as inputs, not encoded ones")
        ids = inputs["input_ids"]
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or not ids.numel():
            got = list(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise InputError(
                f"inputs: expected input_ids as a tensor [rows, tokens] with a token in it, got {got}; encode with "
                "return_tensors='pt', padding=True"
            )
        return [_masked(dict(inputs), pad)], list(range(inputs["input_ids"].shape[0]))
    if encoder is None:
        raise InputError("processor: records and prompts need one; pass the model's processor or tokenizer")
    check_count("batch_size", batch_size, 1)
    records = _prompt_records(inputs)
    shown = [()] * len(records) if demonstrations is None else list(demonstrations)
    if len(shown) != len(records):
        raise InputError(f"demonstrations: expected one list per row ({len(records)}), got {len(shown)}")
    # Rows of like length pad each other least; the sort is stable, so runs repeat.
    size = [
        len(r.prompt) + sum(len(d.prompt) + len(d.report) for d in ds) for r, ds in zip(records, shown, strict=True)
    ]
    order = sorted(range(len(records)), key=lambda i: size[i])
    for i in order:
        _check_text(records[i], shown[i], encoder, max_new_tokens)

    def batches():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            yield encoder.prompts([records[i] for i in rows], [shown[i] for i in rows])

    return batches(), order


def _masked(batch: dict, pad: int | None) -> dict:
    """With an integer attention_mask; without one, leading padding is told by its token, as transformers does."""
    mask = batch.get("attention_mask")
    if mask is not None:
        whole = mask if mask.dtype in (torch.bool, torch.int32, torch.int64) else mask.long()
        return batch | {"attention_mask": whole}
    if pad is None or not bool((batch["input_ids"][:, 0] == pad).any()):
        return batch
    begun = (batch["input_ids"] != pad).long().cumsum(dim=1) > 0
    return batch | {"attention_mask": begun.long()}


def _check_text(record: Record, demonstrations: Sequence[Record], encoder: ReportEncoder, max_new_tokens: int) -> None:
    """Refuse a prompt that is too long before the first is run. Images show their length when they are encoded."""
    context = encoder.context_length
    if context is None or record.images or any(demo.images for demo in demonstrations):
        return
    texts = [record.prompt, *(text for demo in demonstrations for text in (demo.prompt, demo.report))]
    # A token has a byte or more, and a turn's own tokens are few: most prompts need not be encoded for this.
    if sum(len(text.encode()) + 64 for text in texts) + max_new_tokens > context:
        check_room(encoder.prompts([record], [demonstrations]), context, max_new_tokens, f" ({record.id})")


def _prompt_records(inputs) -> list[Record]:
    inputs = [inputs] if isinstance(inputs, str | Record) else inputs
    if not isinstance(inputs, Sequence):
        return to_records(inputs, "inputs")
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


def check_room(batch: dict, context: int | None, max_new_tokens: int, whose: str = "") -> int:
    """The batch's prompt tokens; InputError where one leaves too little room in a context of so many tokens."""
    mask = batch.get("attention_mask")
    length = batch["input_ids"].shape[1]
    if mask is not None and not mask[:, -1].all():
        raise InputError("inputs: a row of input_ids ends in padding; encode with padding_side='left'")
    lengths = [length] * batch["input_ids"].shape[0] if mask is None else mask.sum(dim=1).tolist()
    if context is not None and max(lengths) + max_new_tokens > context:
        raise InputError(
            f"max_new_tokens: a prompt of {max(lengths)} tokens{whose} leaves {max(context - max(lengths), 0)} of the "
            f"model's context of {context}, not {max_new_tokens}; lower max_new_tokens or shorten the prompt"
        )
    return int(sum(lengths))
