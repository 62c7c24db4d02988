"""A batch of records as the trainer needs it."""

from collections.abc import Callable, Sequence

import torch

from dive_fast.data.encoding import TOKEN_ALIGNED, ReportEncoder, Response, append_responses, pad_rows
from dive_fast.data.record import Record
from dive_fast.errors import InputError

IGNORED = -100
"""The target of positions that predict nothing."""


class ReportCollator:
    """Records -> a batch in one of two forms, B rows of T tokens each, padded on the right.

    Both have `input_ids` and `attention_mask`; `targets` [B, T], the report's token (EOS included) that a position
    predicts, -100 where it predicts none; `target_weights` [B, T]; `predictors` [N], the positions b * T + t that have
    a target, in order (found here, on the host, so that no device has to be asked for their number); and `records`.
    The EOS is a target even where the tokenizer pads with it, because padding is told by the mask, never by the token.

    - Whole: rows are prompt and report, with what belongs to images, and `labels`, the report's tokens unshifted.
    - Split: rows are the prompt's last token and the report up to its last but one: every position has a target. The
      rest of the prompts, padded on the left and with what belongs to images, is the mapping `prompts`.

    Args:
        encoder: of the model.
        weigh: (record, response) -> one weight per response token, EOS included; None: all 1.
        demonstrations: record -> demonstrations in its context; None: none.
        split: give the split form, wherever every prompt has two tokens or more and does not end in an image.
    """

    def __init__(
        self,
        encoder: ReportEncoder,
        weigh: Callable[[Record, Response], Sequence[float]] | None = None,
        *,
        demonstrations: Callable[[Record], Sequence[Record]] | None = None,
        split: bool = False,
    ):
        self.encoder = encoder
        self.weigh = weigh
        self.demonstrations = demonstrations
        self.split = split

    def __call__(self, records: Sequence[Record]) -> dict:
        responses = [self.encoder.response(record.report) for record in records]
        shown = None if self.demonstrations is None else [self.demonstrations(record) for record in records]
        prompts = self.encoder.prompts(records, shown)
        self._check_lengths(records, prompts, responses)
        weights = [
            [1.0] * len(r.ids) if self.weigh is None else self.weigh(record, r)
            for record, r in zip(records, responses, strict=True)
        ]
        weights = torch.cat([torch.tensor(row, dtype=torch.float32) for row in weights])
        ids = [r.ids for r in responses]
        if self.split and self._can_split(prompts):
            batch = _split(prompts, ids, self.encoder.pad_token_id)
        else:
            batch = append_responses(prompts, ids, self.encoder.pad_token_id)
            batch["targets"] = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        has_target = batch["targets"] != IGNORED
        batch["target_weights"] = torch.zeros(has_target.shape).masked_scatter(has_target, weights)
        batch["predictors"] = has_target.flatten().nonzero().squeeze(1)
        batch["records"] = list(records)
        return batch

    def _check_lengths(self, records, prompts, responses) -> None:
        limit = self.encoder.context_length
        lengths = prompts["attention_mask"].sum(dim=1).tolist()
        for record, length, response in zip(records, lengths, responses, strict=True):
            if limit is not None and length + len(response.ids) > limit:
                raise InputError(
                    f"record {record.id!r}: prompt and report have {length + len(response.ids)} tokens, the model's "
                    f"context has {limit}; shorten the record or leave it out"
                )

    def _can_split(self, prompts) -> bool:
        image_token = getattr(self.encoder.processor, "image_token_id", None)
        ends_in_image = image_token is not None and bool((prompts["input_ids"][:, -1] == image_token).any())
        return not ends_in_image and int(prompts["attention_mask"].sum(dim=1).min()) > 1


def _split(prompts: dict[str, torch.Tensor], responses: Sequence[Sequence[int]], pad_token_id: int) -> dict:
    """The split form's prompts, input_ids, attention_mask and targets, from left-padded prompts."""
    per_token = ("input_ids", "attention_mask", *TOKEN_ALIGNED)
    last = prompts["input_ids"][:, -1].tolist()
    rows = [torch.tensor([first, *ids[:-1]]) for first, ids in zip(last, responses, strict=True)]
    return {
        "prompts": {key: value[:, :-1] if key in per_token else value for key, value in prompts.items()},
        "input_ids": pad_rows(rows, pad_token_id),
        "attention_mask": pad_rows([torch.ones_like(row) for row in rows], 0),
        "targets": pad_rows([torch.tensor(ids) for ids in responses], IGNORED),
    }
