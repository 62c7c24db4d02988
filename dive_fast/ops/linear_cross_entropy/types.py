"""What `linear_cross_entropy` takes and returns beside plain tensors.

N rows, D hidden size, V vocabulary, K most probable tokens.
"""

from typing import NamedTuple

import torch

TOP_TOKENS = 64
"""K unless the caller says otherwise: it holds nearly all of a report writer's next-token probability."""


class TeacherStatistics(NamedTuple):
    """A teacher's next-token distribution q per row, in D + 2 + 2 K numbers; made by `teacher_statistics`.

    `top` are its K most probable tokens, the tail is the rest of the vocabulary. Float tensors are float32 (float64 for
    float64 inputs).

    Attributes:
        tail_mean_weight: sum over the tail of q_v * weight_v, [..., D].
        tail_mass: sum over the tail of q_v, [...].
        tail_negative_entropy: sum over the tail of q_v * (log q_v - bias_v), [...].
        top_indices: token ids, int32 [..., K].
        top_log_probs: their log q, [..., K].
    """

    tail_mean_weight: torch.Tensor
    tail_mass: torch.Tensor
    tail_negative_entropy: torch.Tensor
    top_indices: torch.Tensor
    top_log_probs: torch.Tensor


class LossStats(NamedTuple):
    """Detached per-row figures in the shape of `targets`; 0 or False on rows that do not count.

    Attributes:
        lse: log-sum-exp of the logits.
        log_prob: log-probability of the target.
        entropy: entropy of the predicted distribution, in nats.
        correct: the target has the largest logit (bool).
        kl: KL(teacher || student) in nats; None without a teacher.
        counted: the row took part in the loss (bool).
    """

    lse: torch.Tensor
    log_prob: torch.Tensor
    entropy: torch.Tensor
    correct: torch.Tensor
    kl: torch.Tensor | None
    counted: torch.Tensor


class RowFigures(NamedTuple):
    """What a backend computes for the rows it is given, [N] each; None where it was not asked for.

    Attributes:
        ce: cross-entropy with smoothing, class weights and z-loss, not yet times the token weight.
        kl: KL(teacher || student).
        lse, log_prob, entropy, correct: as in `LossStats`.
        gradient: ce_share * d ce / d hidden + kl_share * d kl / d hidden, [N, D] in hidden's dtype.
    """

    ce: torch.Tensor
    kl: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    log_prob: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
