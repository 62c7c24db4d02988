"""A batch of records as the trainer needs it."""

from collections.abc import Callable, Sequence

import torch

from dive_fast.data.encoding import ReportEncoder, Response, append_responses
from dive_fast.data.record import Record
from dive_fast.errors import InputError


class ReportCollator:
    """Records -> input_ids, attention_mask, labels, token_weights, the images' tensors, and the records themselves.

    Rows are padded on the right. `labels` are the report's tokens and EOS, -100 elsewhere; the EOS is a label even
    where the tokenizer pads with it, because padding is told by the mask, never by the token.

    Args:
        encoder: of the model.
        weigh: (record, response) -> one weight per response token, EOS included; None: all 1.
        demonstrations: record -> demonstrations in its context; None: none.
    """

    def __init__(
        self,
        encoder: ReportEncoder,
        weigh: Callable[[Record, Response], Sequence[float]] | None = None,
        *,
        demonstrations: Callable[[Record], Sequence[Record]] | None = None,
    ):
        self.encoder = encoder
        self.weigh = weigh
        self.demonstrations = demonstrations

    def __call__(self, records: Sequence[Record]) -> dict:
        responses = [self.encoder.response(record.report) for record in records]
        shown = None if self.demonstrations is None else [self.demonstrations(record) for record in records]
        prompts = self.encoder.prompts(records, shown)
        batch = append_responses(prompts, [r.ids for r in responses], self.encoder.pad_token_id)
        limit = self.encoder.context_length
        for record, length in zip(records, batch["attention_mask"].sum(dim=1).tolist(), strict=True):
            if limit is not None and length > limit:
                raise InputError(
                    f"record {record.id!r}: prompt and report have {length} tokens, the model's context has {limit}; "
                    "shorten the record or leave it out"
                )
        weights = [
            torch.ones(len(r.ids)) if self.weigh is None else torch.tensor(self.weigh(record, r), dtype=torch.float32)
            for record, r in zip(records, responses, strict=True)
        ]
        labelled = batch["labels"] != -100
        batch["token_weights"] = torch.zeros(labelled.shape).masked_scatter(labelled, torch.cat(weights))
        batch["records"] = list(records)
        return batch
