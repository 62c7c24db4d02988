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


class RowInputs(NamedTuple):
    """What a backend is given: states and head, the rows that count, and the loss's options.

    Attributes:
        hidden: [T, D]; weight: [V, D]; unit inner stride.
        targets: int64 [N], in [0, V).
        rows: int64 [N], the row of `hidden` of each target.
        ce_share, kl_share: [N] in the accumulation dtype, the factors of the two losses in the gradient, which is
            exactly 0 where both are 0; kl_share is None without a teacher.
        teacher_rows: int64 [N], the row of `teacher` of each target; None without one.
        teacher: hidden states of some rows, their statistics, or None.
        bias, class_weights: [V] or None.
        logits_dtype: the least precision of the logits.
        max_workspace_bytes: bound on what is held at once, down to a backend's least.
        gradient: compute `RowFigures.gradient`; stats: compute lse, log_prob, entropy and correct.

    label_smoothing, z_loss and softcap are those of `linear_cross_entropy`.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    ce_share: torch.Tensor
    kl_share: torch.Tensor | None
    teacher_rows: torch.Tensor | None
    teacher: torch.Tensor | TeacherStatistics | None
    bias: torch.Tensor | None
    class_weights: torch.Tensor | None
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logits_dtype: torch.dtype
    max_workspace_bytes: int
    gradient: bool
    stats: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N, V and D."""
        return len(self.targets), *self.weight.shape

    @property
    def statistics(self) -> TeacherStatistics | None:
        """The teacher where it comes as statistics."""
        return self.teacher if isinstance(self.teacher, TeacherStatistics) else None

    @property
    def teacher_hidden(self) -> torch.Tensor | None:
        """The teacher where it comes as hidden states."""
        return None if isinstance(self.teacher, TeacherStatistics) else self.teacher


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
