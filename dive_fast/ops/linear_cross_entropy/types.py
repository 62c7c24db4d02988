"""What `linear_cross_entropy` takes and returns beside plain tensors."""

from typing import NamedTuple

import torch


class TeacherStatistics(NamedTuple):
    """A teacher's next-token distribution q per row, in D + 1 numbers; made by `teacher_statistics`.

    Attributes:
        mean_weight: E_q[W] = q @ W, [..., D], float32 (float64 for float64 inputs).
        negative_entropy: sum_v q_v log q_v - E_q[bias], [...], same dtype; without a bias the negative entropy of q.
    """

    mean_weight: torch.Tensor
    negative_entropy: torch.Tensor


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
