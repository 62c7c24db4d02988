"""The inputs of `generate`: records, prompts or encoded rows, as batches of model inputs."""

from collections.abc import Mapping, Sequence

from dive_fast.data import to_records
from dive_fast.data.encoding import ReportEncoder
from dive_fast.data.record import Record
from dive_fast.decode.options import check_count
from dive_fast.errors import InputError


def batches_of(inputs, encoder: ReportEncoder | None, batch_size: int, demonstrations):
    """(batches of model inputs, the input's position of each row as they come)."""
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs:
            raise InputError(f"inputs: a mapping needs input_ids, got {', '.join(inputs)}")
        if demonstrations is not None:
            raise InputError("demonstrations: they need records or prompts as inputs, not encoded ones")
        return [dict(inputs)], list(range(inputs["input_ids"].shape[0]))
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


def check_room(batch: dict, context: int, max_new_tokens: int) -> int:
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
