"""Training runs that are measured side by side, from the first step to the last: ours, and what it replaces.

All systems see the same batches in the same order under the same schedule of the learning rate, and are evaluated on
the same held-out reports, which no clock counts. A step is that of `train_steps`.
"""

import copy
import functools
import random
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import train_steps
from benchmarks.train_steps import IMPLEMENTATIONS
from dive_fast.data.encoding import ReportEncoder
from dive_fast.data.open_i import load_open_i
from dive_fast.data.record import Record
from dive_fast.models.backbone import load_backbone, quick_dtype
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer

OURS = "dive_fast scope response"
SYSTEMS = (OURS, "dive_fast scope all", "plain hooks", "PEFT LoRA q, v")
# Peak rates, linear decay to 0: each system's best of those tried, by the loss of the held-out reports.
RATES = {
    "tiny": dict.fromkeys(SYSTEMS, 1e-1) | {"PEFT LoRA q, v": 3e-2},
    "smollm2": dict.fromkeys(SYSTEMS, 2e-2) | {"PEFT LoRA q, v": 1e-2},
}
TINY_REPORTS = (
    "the lungs are clear .",
    "the heart is normal in size . no pleural effusion .",
    "left pleural effusion . the heart is enlarged .",
)
SEED = 0


@dataclass(frozen=True)
class Problem:
    """A backbone, its reports, and the loss to reach.

    Attributes:
        backbone: "smollm2" or "tiny".
        steps, reports: of training, and reports in each step.
        evaluate_every: steps between evaluations.
        held_out: reports that the loss is measured on.
        threshold: nats per token.
    """

    backbone: str
    steps: int
    reports: int
    evaluate_every: int
    held_out: int
    threshold: float
    device: str = "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """What the backbone is loaded in where nothing is said."""
        return torch.float32 if self.backbone == "tiny" else quick_dtype()

    def __str__(self) -> str:
        return f"{self.device}-{self.backbone}-{self.steps}steps"


@functools.lru_cache(maxsize=1)
def task(problem: Problem):
    """(the frozen model, its encoder, the steps' records, the held-out ones)."""
    if problem.backbone == "tiny":
        model, processor = tiny_llama(), tiny_tokenizer()
        count = problem.steps * problem.reports + problem.held_out
        every = [Record(f"r{i}", f"case {i}", TINY_REPORTS[i % len(TINY_REPORTS)]) for i in range(count)]
        training, held_out = every[problem.held_out :], every[: problem.held_out]
    else:
        model, processor = load_backbone(problem.backbone, dtype=problem.dtype)
        draw = random.Random(SEED).sample
        training = draw(load_open_i(split="train"), problem.steps * problem.reports)
        held_out = draw(load_open_i(split="val"), problem.held_out)
    return model.to(problem.device).requires_grad_(False), ReportEncoder(processor), training, held_out


def frozen_copy(problem: Problem):
    """A model of its own that shares the frozen weights."""
    model = task(problem)[0]
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


class Training:
    """One system's run; a call is its next step.

    Attributes:
        taken: steps so far.
        curve: (steps taken, loss of the held-out reports) of every evaluation.
    """

    def __init__(self, problem: Problem, name: str):
        self.problem, self.taken, self.curve = problem, 0, []
        _, encoder, records, held_out = task(problem)
        torch.manual_seed(SEED)
        self.loss, self.model, collate = IMPLEMENTATIONS[name](frozen_copy(problem).train(), encoder)
        together = partial(_batches, collate, size=problem.reports, device=problem.device)
        self.batches, self.held_out = together(records), together(held_out)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATES[problem.backbone][name])
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / problem.steps)

    def prepare(self) -> None:
        """Evaluates where it is due."""
        if self.taken % self.problem.evaluate_every == 0 and (not self.curve or self.curve[-1][0] < self.taken):
            self.curve.append((self.taken, self.evaluate()))

    def __call__(self) -> None:
        self.step(self.batches[self.taken])
        self.schedule.step()
        self.taken += 1

    def step(self, batch: dict) -> tuple[torch.Tensor]:
        """Forward, backward and update."""
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return (loss.detach(),)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Nats per token of the held-out reports."""
        tokens = [len(batch["predictors"]) for batch in self.held_out]
        losses = [float(self.loss(batch)) for batch in self.held_out]
        return sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)

    def largest_batch(self) -> dict:
        """The batch with the most positions, padding included: it decides the peak of memory."""
        return max(self.batches, key=lambda batch: sum(part["input_ids"].numel() for part in _parts(batch)))


def _batches(collate, records: list[Record], *, size: int, device: str) -> list[dict]:
    chunks = [records[start : start + size] for start in range(0, len(records), size)]
    return [train_steps.to_device(collate(chunk), device) for chunk in chunks]


def _parts(batch: dict) -> list[dict]:
    return [batch, *([batch["prompts"]] if batch.get("prompts") else [])]


@functools.lru_cache(maxsize=1)
def trained_model(problem: Problem):
    """The model of `OURS` behind its last step, in eval mode."""
    training = Training(problem, OURS)
    for _ in range(problem.steps):
        training()
    return training.model.eval()
