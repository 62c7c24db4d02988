"""Likelihood of held-out reports: what perplexity is made of.

B batch rows, T tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import nn

from dive_fast import ops
from dive_fast.data.collator import ReportCollator
from dive_fast.data.encoding import ReportEncoder
from dive_fast.data.record import Record
from dive_fast.models.hidden import hidden_states
from dive_fast.models.spec import lm_head_of, logit_softcap_of
from dive_fast.steering import response_positions_from_labels

NOT_FOR_THE_MODEL = ("labels", "token_weights", "records")
"""Entries of a collated batch that the model's forward does not take."""


def model_inputs(batch: dict, model: nn.Module) -> dict:
    """The part of a collated batch that goes into the model; a steered model is told its response positions."""
    inputs = {key: value for key, value in batch.items() if key not in NOT_FOR_THE_MODEL}
    if hasattr(model, "peft_config"):
        inputs["response_positions"] = response_positions_from_labels(batch["labels"])
    return inputs


@torch.no_grad()
def batch_nll(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the response tokens' negative log-likelihoods [B] float32, their number [B] int64), EOS included."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = lm_head_of(base)
    states = hidden_states(model, model_inputs(batch, model))
    targets = batch["labels"][:, 1:]
    losses = ops.linear_cross_entropy(
        states.final[:, :-1],
        head.weight,
        targets,
        bias=head.bias,
        softcap=logit_softcap_of(base),
        reduction="none",
    )
    return losses.sum(dim=1), (targets != -100).sum(dim=1)


def report_nll(
    model: nn.Module,
    records: Sequence[Record],
    encoder: ReportEncoder,
    *,
    demonstrations: Callable[[Record], Sequence[Record]] | None = None,
    batch_size: int = 8,
    steered: bool = True,
) -> tuple[list[float], list[int]]:
    """Per record the sum of its tokens' negative log-likelihoods and their number, in the records' order.

    Args:
        demonstrations: record -> demonstrations in the context (the teacher); None: the prompt alone.
        batch_size: records of similar length are run together.
        steered: False switches the model's adapters off.
    """
    collate = ReportCollator(encoder, demonstrations=demonstrations)
    device = next(model.parameters()).device
    order = sorted(range(len(records)), key=lambda i: len(records[i].prompt) + len(records[i].report))
    sums, counts = [0.0] * len(records), [0] * len(records)
    training = model.training
    model.eval()
    try:
        with model.disable_adapter() if not steered and hasattr(model, "disable_adapter") else nullcontext():
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch = collate([records[i] for i in rows])
                batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
                nll, tokens = batch_nll(model, batch)
                for row, value, count in zip(rows, nll.tolist(), tokens.tolist(), strict=True):
                    sums[row], counts[row] = value, count
    finally:
        model.train(training)
    return sums, counts
