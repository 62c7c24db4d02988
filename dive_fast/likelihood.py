"""Likelihood of held-out reports: what perplexity is made of.

B batch rows, T tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import nn

from dive_fast import ops
from dive_fast.data.collator import IGNORED, ReportCollator
from dive_fast.data.encoding import ReportEncoder
from dive_fast.data.record import Record
from dive_fast.models.head import check_head, head_of
from dive_fast.models.hidden import HiddenStates, hidden_states, unwrapped
from dive_fast.models.modes import evaluating
from dive_fast.models.prefix import continue_prefix
from dive_fast.prompt_store import PromptStore
from dive_fast.steering import DiveModel
from dive_fast.supervision.teacher import without_steering

NOT_FOR_THE_MODEL = ("prompts", "labels", "targets", "target_weights", "predictors", "records")
"""Entries of a collated batch that the model's forward does not take."""


def batch_states(
    model: nn.Module, batch: dict, *, layers: bool = False, store: PromptStore | None = None
) -> HiddenStates:
    """Hidden states [B, T, D] of a collated batch; a steered model is told its response positions.

    Args:
        batch: of `ReportCollator`. In the split form the prompts are run first, unsteered and without gradient, so the
            steering's scope must be "response".
        layers: also return the residual streams.
        store: where the prompts' caches are looked up and kept.
    """
    inputs = {key: value for key, value in batch.items() if key not in NOT_FOR_THE_MODEL}
    if isinstance(getattr(_inside_wrappers(model), "base_model", None), DiveModel):
        inputs["response_positions"] = batch["targets"] != IGNORED
    if "prompts" not in batch:
        return hidden_states(model, inputs, layers=layers)
    with without_steering(_inside_wrappers(model)):
        prefix = (store or PromptStore()).prefix(model, batch["records"], batch["prompts"])
    return continue_prefix(model, prefix, **inputs, layers=layers)


def _inside_wrappers(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


@torch.no_grad()
def batch_nll(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the response tokens' negative log-likelihoods [B] float32, their number [B] int64), EOS included."""
    head = head_of(unwrapped(model))
    states = batch_states(model, batch)
    targets, rows = (batch[name].to(states.final.device) for name in ("targets", "predictors"))
    losses = ops.linear_cross_entropy(
        head.inputs(states.final), head.weight, targets, rows=rows, reduction="none", **head.options
    )
    return losses.sum(dim=1), (targets != IGNORED).sum(dim=1)


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

    Raises:
        InputError: the model does something to its logits that is not known here.
    """
    check_head(unwrapped(model))
    collate = ReportCollator(encoder, demonstrations=demonstrations)
    device = next(model.parameters()).device
    order = sorted(range(len(records)), key=lambda i: len(records[i].prompt) + len(records[i].report))
    sums, counts = [0.0] * len(records), [0] * len(records)
    adapters = model.disable_adapter() if not steered and hasattr(model, "disable_adapter") else nullcontext()
    with evaluating(model), adapters:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = collate([records[i] for i in rows])
            batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            nll, tokens = batch_nll(model, batch)
            for row, value, count in zip(rows, nll.tolist(), tokens.tolist(), strict=True):
                sums[row], counts[row] = value, count
    return sums, counts
