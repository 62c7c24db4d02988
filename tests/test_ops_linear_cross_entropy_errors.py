"""What linear_cross_entropy and teacher_statistics refuse, and what the messages say."""

import math
import re

import pytest
import torch

from dive_fast.errors import InputError
from dive_fast.ops import TeacherStatistics, linear_cross_entropy, teacher_statistics


def sharded(value):
    class Sharded(torch.Tensor):
        def full_tensor(self):
            return self

    return value.as_subclass(Sharded)


# What replaces which argument of a sound call, and what the message must contain.
STATS = TeacherStatistics(
    torch.zeros(4, 3), torch.zeros(4), torch.zeros(4), torch.zeros(4, 2, dtype=torch.int32), torch.zeros(4, 2)
)
BAD_ARGUMENTS = [
    ({"hidden": [1.0]}, "hidden: expected a tensor, got list"),
    ({"hidden": torch.zeros(4, 3, dtype=torch.int64)}, "hidden: expected float16"),
    ({"hidden": torch.zeros(4, 2)}, "hidden: expected shape [..., D] with weight's D = 3"),
    ({"hidden": torch.zeros(())}, "hidden: expected shape"),
    ({"weight": torch.zeros(0, 3)}, "weight: expected shape [V, D] with V >= 1"),
    ({"weight": torch.zeros(0)}, "ZeRO-3"),
    ({"weight": sharded(torch.zeros(5, 3))}, "weight.full_tensor()"),
    ({"weight": torch.zeros(5, 3, device="meta")}, "weight: expected a tensor on cpu, got meta"),
    ({"targets": torch.zeros(4)}, "targets: expected an int64 tensor"),
    ({"targets": [0, 1, 2, 3]}, "targets: expected an int64 tensor, got list"),
    ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets: expected shape"),
    ({"targets": torch.zeros(4, dtype=torch.int64, device="meta")}, "targets: expected a tensor on cpu"),
    ({"targets": torch.tensor([0, 1, 5, 2])}, "got 5 in row 2"),
    ({"targets": torch.tensor([0, -1, 4, 2])}, "got -1 in row 1"),
    ({"token_weights": torch.ones(4, 1)}, "token_weights: expected shape of targets"),
    ({"token_weights": torch.ones(4, dtype=torch.int64)}, "token_weights: expected float16"),
    ({"token_weights": torch.ones(4, requires_grad=True)}, "token_weights.detach()"),
    ({"token_weights": torch.tensor([1, 1, 1, -2.0])}, "got -2.0 in row 3"),
    ({"token_weights": torch.tensor([1, math.nan, 1, 1])}, "got nan in row 1"),
    ({"token_weights": torch.tensor([math.inf, 1, 1, 1])}, "got inf in row 0"),
    ({"bias": torch.zeros(3)}, "bias: expected shape [V] = [5], got [3]"),
    ({"bias": 0.0}, "bias: expected a tensor [V], got float"),
    ({"ignore_index": None}, "ignore_index: expected an int"),
    ({"label_smoothing": 1.0}, "label_smoothing: expected a number in [0, 1)"),
    ({"label_smoothing": -0.1}, "label_smoothing"),
    ({"z_loss": -1.0}, "z_loss: expected a finite number >= 0"),
    ({"kl_weight": math.nan}, "kl_weight: expected a finite number >= 0"),
    ({"softcap": 0.0}, "softcap: expected None or a finite number > 0"),
    ({"kl_weight": 0.5}, "teacher: expected a teacher because kl_weight > 0"),
    ({"teacher": torch.zeros(4, 2)}, "teacher: expected shape of hidden"),
    ({"teacher": "big"}, "teacher: expected a tensor"),
    ({"teacher": STATS._replace(tail_mean_weight=torch.zeros(4, 2))}, "teacher.tail_mean_weight: expected shape"),
    ({"teacher": STATS._replace(tail_mass=torch.zeros(4, 1))}, "teacher.tail_mass: expected shape"),
    (
        {"teacher": STATS._replace(tail_negative_entropy=torch.zeros(3))},
        "teacher.tail_negative_entropy: expected shape",
    ),
    ({"teacher": STATS._replace(top_indices=torch.zeros(4, 2))}, "teacher.top_indices: expected int32 [4, 2]"),
    ({"teacher": STATS._replace(top_log_probs=torch.zeros(4))}, "teacher.top_log_probs: expected shape"),
    ({"teacher": STATS._replace(top_indices=STATS.top_indices + 5), "kl_weight": 1.0}, "got 5 in row 0"),
    ({"class_weights": torch.ones(4)}, "class_weights: expected shape [V] = [5], got [4]"),
    ({"class_weights": torch.ones(5, requires_grad=True)}, "class_weights.detach()"),
    (
        {"class_weights": torch.tensor([1, 1, -1.0, 1, 1])},
        "class_weights: expected finite values >= 0, got -1.0 in row 2",
    ),
    ({"rows": torch.zeros(2)}, "rows: expected an int64 tensor [N]"),
    ({"rows": [0]}, "rows: expected an int64 tensor [N], got list"),
    ({"rows": torch.tensor([2, 0, 2])}, "rows: expected every row once, got 2 more than once"),
    ({"rows": torch.tensor([1, 4])}, "rows: expected values in [0, 4), got 4 in row 1"),
    ({"teacher": STATS, "softcap": 5.0}, "because softcap is set"),
    ({"teacher": STATS, "kl_weight": 1.0, "weight": torch.zeros(5, 3, requires_grad=True)}, "head is being trained"),
    ({"teacher": STATS, "kl_weight": 1.0, "bias": torch.zeros(5, requires_grad=True)}, "head is being trained"),
    ({"reduction": "average"}, "reduction: expected one of 'mean', 'sum', 'none', got 'average'"),
    ({"denominator": 4.0, "reduction": "sum"}, "denominator: expected None"),
    ({"denominator": 4.0, "teacher": STATS}, "denominator: expected a pair"),
    ({"denominator": (4.0, 4.0)}, "denominator: expected a number or 0-d tensor"),
    ({"denominator": -1.0}, "denominator: expected a finite number"),
    ({"denominator": torch.ones(1)}, "denominator: expected a finite number or 0-d tensor"),
    ({"denominator": torch.tensor(math.nan)}, "denominator: expected a finite number"),
    ({"denominator": torch.tensor(1.0, requires_grad=True)}, "without gradient"),
    ({"logits_dtype": torch.bfloat16}, "logits_dtype: expected None, torch.float32 or hidden's"),
    ({"max_workspace_bytes": 0}, "max_workspace_bytes: expected an int > 0"),
    ({"backend": "cuda"}, "('native', 'reference'), got 'cuda'"),
    ({"backend": "native", "hidden": torch.zeros(4, 3, dtype=torch.float64)}, "'native' cannot run this"),
    ({"backend": "native", "weight": torch.zeros(5, 3, requires_grad=True)}, "it is for a frozen head"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS, ids=[m for _, m in BAD_ARGUMENTS])
def test_bad_arguments_are_named(change, message):
    sound = {"hidden": torch.zeros(4, 3), "weight": torch.zeros(5, 3), "targets": torch.tensor([0, 1, 4, -100])}
    linear_cross_entropy(**sound)
    with pytest.raises(InputError, match=re.escape(message)):
        linear_cross_entropy(**sound | change)


def test_teacher_statistics_refuses_the_same_heads():
    with pytest.raises(InputError, match="weight: expected shape"):
        teacher_statistics(torch.zeros(4, 3), torch.zeros(0, 3))
    with pytest.raises(InputError, match="bias: expected shape"):
        teacher_statistics(torch.zeros(4, 3), torch.zeros(5, 3), bias=torch.zeros(4))
    with pytest.raises(InputError, match="top_k: expected an int >= 0, got -1"):
        teacher_statistics(torch.zeros(4, 3), torch.zeros(5, 3), top_k=-1)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_rows_that_are_not_looked_at_make_the_loss_nan(backend):
    hidden, weight = torch.zeros(5, 3), torch.zeros(6, 3)
    targets, weights = torch.tensor([0, 99, 2, -100, 3]), torch.tensor([1.0, 1.0, -1.0, 1.0, math.inf])

    def loss(reduction):
        return linear_cross_entropy(
            hidden, weight, targets, weights, reduction=reduction, check_values=False, backend=backend
        )

    assert loss("none").isnan().tolist() == [False, True, True, False, True]
    assert loss("mean").isnan() and loss("sum").isnan()
