"""Ways to write reports that are measured side by side: whole calls, from prompts to the reports' ends.

Prompts come sorted by length, so that nobody's padding is by chance.
"""

import copy

import torch

import dive_fast
from benchmarks import end_to_end
from benchmarks.decode_problems import APPROXIMATE_TOLERANCE, EXTREMES
from benchmarks.end_to_end import Problem
from dive_fast.decode.native import NativeDecoder
from dive_fast.decode.plan import Unsupported

# Nats per token that float32 arithmetic may cost: two likeliest tokens within its rounding.
FLOAT32_SHORTFALL = 1e-4


class Task:
    """Prompts and the model that answers them, with the trained adapter or without."""

    def __init__(self, problem: Problem, steered: bool, reports: int, batch: int, max_new_tokens: int):
        self.problem, self.batch, self.max_new_tokens = problem, batch, max_new_tokens
        model, self.encoder, training, held_out = end_to_end.task(problem)
        records = [*held_out, *training][:reports]
        self.records = sorted(records, key=lambda record: len(self.prompts([record])["input_ids"][0]))
        self.model = end_to_end.trained_model(problem) if steered else model.eval()
        self.steered, self.end, self.pad = steered, self.encoder.end_token_id, self.encoder.pad_token_id

    def prompts(self, records) -> dict[str, torch.Tensor]:
        """Padded on the left, on the model's device."""
        return {name: value.to(self.problem.device) for name, value in self.encoder.prompts(records).items()}


class Native:
    """`dive_fast.generate` on the compiled engine: finished rows leave the batch and waiting ones take their place."""

    options: dict = {}

    def __init__(self, task: Task):
        self.task, self.tokens = task, []

    @classmethod
    def missing(cls, task: Task) -> str | None:
        try:
            NativeDecoder(task.model, None, **cls.options)
        except Unsupported as reason:
            return f"engine='native' refuses: {reason}"
        return None

    def __call__(self) -> None:
        task = self.task
        written = dive_fast.generate(
            task.model,
            task.records,
            processor=task.encoder.processor,
            engine="native",
            max_new_tokens=task.max_new_tokens,
            batch_size=task.batch,
            **self.options,
        )
        self.tokens = [row.tolist() for row in written.sequences]


class NativeInt8(Native):
    """The same with 8-bit weights."""

    options = {"weights": "int8"}


class Transformers:
    """transformers' `generate`, batch by batch, each until its last row has ended; steered by PEFT's hooks."""

    def __init__(self, task: Task):
        self.task, self.tokens = task, []

    @classmethod
    def missing(cls, task: Task) -> str | None:
        return None

    @torch.no_grad()
    def __call__(self) -> None:
        task, self.tokens = self.task, []
        for start in range(0, len(task.records), task.batch):
            prompts = task.prompts(task.records[start : start + task.batch])
            written = task.model.generate(
                **prompts,
                max_new_tokens=task.max_new_tokens,
                do_sample=False,
                eos_token_id=task.end,
                pad_token_id=task.pad,
            )
            self.tokens += [self._until_the_end(row) for row in written[:, prompts["input_ids"].shape[1] :].tolist()]

    def _until_the_end(self, row: list[int]) -> list[int]:
        return row[: row.index(self.task.end) + 1] if self.task.end in row else row


WRITERS = {"dive_fast": Native, "dive_fast int8": NativeInt8, "transformers": Transformers}


def check(task: Task, writers: dict) -> dict[str, float]:
    """Writes once with each, and asserts that what ours wrote is what the model finds likeliest.

    Returns:
        Name -> mean nats by which a token that was taken falls short of the likeliest one, by the model in float32.
    """
    found = {}
    for name, writer in writers.items():
        writer()
        assert len(writer.tokens) == len(task.records) and all(writer.tokens), f"{name} left rows out"
        found[name] = shortfall(task, writer.tokens)
    allowed = max(EXTREMES * found["transformers"], FLOAT32_SHORTFALL)
    for name, value in found.items():
        bound = APPROXIMATE_TOLERANCE if "int8" in name else allowed
        # written so that NaN fails
        assert value <= bound, f"{name} takes tokens that fall short by {value:.2g} nats, more than {bound:.2g}"
    return found


@torch.no_grad()
def shortfall(task: Task, tokens: list[list[int]]) -> float:
    """Mean over all tokens; one row at a time, so that no padding is in the way."""
    total, precise = 0.0, copy.deepcopy(task.model).float()
    for record, row in zip(task.records, tokens, strict=True):
        prompt = task.prompts([record])["input_ids"]
        taken = torch.tensor([row], device=prompt.device)
        ids = torch.cat([prompt, taken[:, :-1]], dim=1)
        steered = (torch.arange(ids.shape[1]) >= prompt.shape[1] - 1)[None].to(ids.device)
        more = {"response_positions": steered} if task.steered else {}
        logits = precise(input_ids=ids, use_cache=False, logits_to_keep=len(row), **more).logits
        total += float((logits.amax(-1) - logits.gather(-1, taken[..., None]).squeeze(-1)).sum())
    return total / sum(map(len, tokens))
