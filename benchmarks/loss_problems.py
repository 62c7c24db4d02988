"""What the loss group measures: one size of the loss with its inputs, its true result and its floor.

T rows, N rows that count, D hidden size, V vocabulary.
"""

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from benchmarks import measure
from dive_fast.ops import linear_cross_entropy
from dive_fast.ops.linear_cross_entropy import spec, teacher_statistics

IGNORE_INDEX = -100
FLOOR_ROUNDS = 3
# Largest error of loss and of gradient, relative to the largest true value: what a wrong row, weight or scale exceeds
# by far, and an implementation that works in the dtype of its inputs does not.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}


@dataclass(frozen=True, eq=False)
class Problem:
    """A case on a device, "cpu" or "cuda"."""

    case: spec.Case
    device: str

    def __str__(self):
        return f"{self.device}-{self.case.name}"


class Inputs(NamedTuple):
    """What every implementation is given; only `hidden` requires grad.

    Attributes:
        hidden, weight, targets, token_weights: [T, D], [V, D], [T] and [T] or None.
        rows: [N], where the rows that count lie; a collator knows them.
        taught: the teacher's hidden states in these rows, [N, D], or None.
        statistics: the same teacher as cached by `teacher_statistics`, or None where the case gives hidden states.
        upstream: the loss's incoming gradient [T] for reduction "none", else None.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    token_weights: torch.Tensor | None
    rows: torch.Tensor
    taught: torch.Tensor | None
    statistics: object
    upstream: torch.Tensor | None
    reduction: str
    kl_weight: float


class Prepared(NamedTuple):
    """A problem's inputs, its true loss and hidden gradient (float64), and the floor in seconds."""

    inputs: Inputs
    loss: torch.Tensor
    gradient: torch.Tensor
    floor: float


@functools.lru_cache(maxsize=1)
def prepare(problem: Problem) -> Prepared:
    """Inputs, truth and floor; kept until the next problem."""
    inputs = make_inputs(problem)
    return Prepared(inputs, *truth(inputs), floor(inputs, problem))


def make_inputs(problem: Problem) -> Inputs:
    """Tensors of the case, from a fixed seed."""
    case = problem.case
    kind = replace(case, teacher=None if case.teacher is None else "hidden")
    (hidden, weight, targets, token_weights), options = spec.make_inputs(kind, problem.device)
    rows = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    taught = None if case.teacher is None else options["teacher"][rows]
    upstream = None
    if options["reduction"] == "none":
        upstream = torch.linspace(0.5, 1.5, case.rows, device=problem.device)
    return Inputs(
        hidden.requires_grad_(),
        weight,
        targets,
        token_weights,
        rows,
        taught,
        teacher_statistics(taught, weight) if case.teacher == "statistics" else None,
        upstream,
        options["reduction"],
        options.get("kl_weight", 0.0),
    )


def step(function: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> Callable[[], tuple]:
    """What is measured: the loss of `function` and hidden's gradient, as the pair (loss, gradient)."""

    def forward_and_backward():
        loss = function(inputs)
        upstream = None if inputs.upstream is None else inputs.upstream.to(loss.dtype)
        (gradient,) = torch.autograd.grad(loss, inputs.hidden, upstream)
        return loss.detach(), gradient

    return forward_and_backward


def truth(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of the rows that count in float64, by the op's plain PyTorch reference."""
    rows, weights, taught = inputs.rows, inputs.token_weights, inputs.taught
    hidden = inputs.hidden.detach()[rows].double().requires_grad_()
    loss = linear_cross_entropy(
        hidden,
        inputs.weight.double(),
        inputs.targets[rows],
        None if weights is None else weights[rows],
        teacher=None if taught is None else taught.double(),
        kl_weight=inputs.kl_weight,
        reduction=inputs.reduction,
        backend="reference",
    )
    upstream = None if inputs.upstream is None else inputs.upstream[rows].double()
    (gradient,) = torch.autograd.grad(loss, hidden, upstream)
    everywhere = torch.zeros(inputs.hidden.shape, dtype=torch.float64, device=hidden.device)
    if loss.dim():
        loss = everywhere.new_zeros(len(inputs.targets)).index_copy(0, rows, loss.detach())
    return loss.detach(), everywhere.index_copy(0, rows, gradient)


def errors(result: tuple, prepared: Prepared) -> tuple[float, float]:
    """Largest error of loss and gradient, relative to the largest true value."""
    found = []
    for ours, true in zip(result, (prepared.loss, prepared.gradient), strict=True):
        assert ours.shape == true.shape, f"expected shape {tuple(true.shape)}, got {tuple(ours.shape)}"
        found.append(float((ours.double() - true).abs().max() / true.abs().max()))
    return tuple(found)


def floor(inputs: Inputs, problem: Problem) -> float:
    """Seconds of the products that no implementation can leave out, bare: torch.mm over the rows that count.

    Logits and hidden's gradient, and a teacher's logits where its hidden states are given. Median of a few rounds.
    """
    with torch.no_grad():
        states = inputs.hidden[inputs.rows]
        logits, gradient = states @ inputs.weight.T, torch.empty_like(states)

        def products():
            torch.mm(states, inputs.weight.T, out=logits)
            if problem.case.teacher == "hidden":
                torch.mm(inputs.taught, inputs.weight.T, out=logits)
            torch.mm(logits, inputs.weight, out=gradient)

        products()
        return statistics.median(measure.seconds(products, problem.device) for _ in range(FLOOR_ROUNDS))
