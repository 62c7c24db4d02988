"""Training steps that are measured side by side: ours, and what its user would otherwise write.

A step is forward, backward and an AdamW update of the adapter, over one batch of reports behind their prompts.

B reports, P prompt tokens, R report tokens, D hidden size, r adapter rank.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import peft
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.decode_models import CONFIGS, random_model
from dive_fast import DiveConfig, ops
from dive_fast.data.collator import ReportCollator
from dive_fast.data.encoding import ReportEncoder
from dive_fast.data.open_i import load_open_i
from dive_fast.data.record import Record
from dive_fast.likelihood import batch_states
from dive_fast.models.backbone import load_backbone
from dive_fast.models.spec import decoder_of
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer
from dive_fast.prompt_store import PromptStore

RANK = 16
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Problem:
    """A backbone and a batch.

    Attributes:
        backbone: "smollm2" (a 135M model of 30 layers), "tiny", or one of `CONFIGS` (its shapes, random weights).
        reports: B.
        prompt_tokens: 0 takes Open-i's own prompts; otherwise their words are repeated to about so many tokens.
        dtype: of the backbone; adapters are float32.
    """

    backbone: str
    reports: int
    prompt_tokens: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __str__(self) -> str:
        prompt = f"prompt{self.prompt_tokens}" if self.prompt_tokens else "open_i"
        return f"{self.device}-{self.backbone}-{str(self.dtype)[6:]}-batch{self.reports}-{prompt}"


def load(problem: Problem):
    """(a fresh frozen model, its encoder, the batch's records)."""
    if problem.backbone == "tiny":
        model, tokenizer = tiny_llama(), tiny_tokenizer()
        records = [Record(f"r{i}", f"case {i}", "the lungs are clear .") for i in range(problem.reports)]
    elif problem.backbone in CONFIGS:
        base = _large_model(problem)
        # The steps that take turns share the frozen weights: a GPU holds them once.
        model = copy.deepcopy(base, {id(weight): weight for weight in base.parameters()})
        tokenizer = tiny_tokenizer()
        records = [Record(f"r{i}", f"case {i}", "the lungs are clear . " * 20) for i in range(problem.reports)]
    else:
        model, tokenizer = load_backbone(problem.backbone, dtype=problem.dtype)
        records = load_open_i(split="train")[: problem.reports]
    model = model.to(problem.device, problem.dtype).requires_grad_(False).train()
    encoder = ReportEncoder(tokenizer)
    if problem.prompt_tokens:
        records = [_with_long_prompt(record, encoder, problem.prompt_tokens) for record in records]
    return model, encoder, records


@functools.lru_cache(maxsize=1)
def _large_model(problem: Problem):
    return random_model(problem.backbone, problem.dtype, problem.device)


def _with_long_prompt(record: Record, encoder: ReportEncoder, tokens: int) -> Record:
    """The prompt's own words over and over, for about `tokens` tokens with the template around them."""
    words = record.prompt.split()
    while len(encoder.prompts([record])["input_ids"][0]) < tokens:
        record = replace(record, prompt=f"{record.prompt} {' '.join(words[: tokens // 8])}")
    return record


class Step:
    """One implementation on one problem: calling it takes a step and returns the loss.

    Attributes:
        tokens: real tokens of the batch; `targets`, those of the reports.
    """

    def __init__(self, problem: Problem, prepare: Callable):
        model, encoder, records = load(problem)
        torch.manual_seed(0)
        self.loss, self.model, collate = prepare(model, encoder)
        self.batch = to_device(collate(records), problem.device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
        self.parameters = sum(p.numel() for p in trained)
        self.targets = len(self.batch["predictors"])
        self.tokens = int(self.batch["attention_mask"].sum()) + sum(
            int(part["attention_mask"].sum()) for part in [self.batch.get("prompts")] if part
        )

    def __call__(self) -> tuple[torch.Tensor]:
        loss = self.loss(self.batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return (loss.detach(),)


def to_device(batch: dict, device: str) -> dict:
    move = {torch.Tensor: lambda x: x.to(device), dict: lambda x: to_device(x, device)}
    return {name: move.get(type(value), lambda x: x)(value) for name, value in batch.items()}


def ours(model, encoder, *, scope: str, kept: bool = False):
    """The library's own step: steering inside the layers, the fused loss on the rows that count."""
    steered = peft.get_peft_model(model, DiveConfig(r=RANK, scope=scope))
    head, store = model.get_output_embeddings(), PromptStore(2**40 if kept else 0)

    def loss(batch):
        states = batch_states(steered, batch, store=store)
        return ops.linear_cross_entropy(states.final, head.weight, batch["targets"], rows=batch["predictors"])

    return loss, steered, ReportCollator(encoder, split=scope == "response")


class Bottleneck(nn.Module):
    """h + up(phi(down(n))): what ours computes, from torch's modules; NodiReFT's without phi and normalization."""

    def __init__(self, size: int, activation: Callable | None, normalize: bool):
        super().__init__()
        self.down, self.up = nn.Linear(size, RANK), nn.Linear(RANK, size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.activation, self.normalize = activation, normalize

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        x = h.float()
        n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) if self.normalize else x
        a = self.down(n)
        push = self.up(a if self.activation is None else self.activation(a))
        return (x + push).to(h.dtype)


def plain_hooks(model, encoder, *, activation=F.silu, normalize: bool = True):
    """A forward hook on every layer, and the model's own loss over its own logits."""
    layers = decoder_of(model).layers
    adapters = nn.ModuleList(Bottleneck(model.config.hidden_size, activation, normalize) for _ in layers)
    adapters.to(next(model.parameters()).device)

    def steer(adapter, layer, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        steered = adapter(hidden)
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    for layer, adapter in zip(layers, adapters, strict=True):
        layer.register_forward_hook(partial(steer, adapter))

    return lambda batch: model(**_for_the_model(batch)).loss, adapters, ReportCollator(encoder)


def lora(model, encoder):
    """PEFT's LoRA of the same rank on the query and value projections."""
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(model, config)
    return lambda batch: adapted(**_for_the_model(batch)).loss, adapted, ReportCollator(encoder)


def _for_the_model(batch: dict) -> dict:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")} | {"use_cache": False}


IMPLEMENTATIONS = {
    "dive_fast scope all": partial(ours, scope="all"),
    "dive_fast scope response": partial(ours, scope="response"),
    "dive_fast scope response, prompts kept": partial(ours, scope="response", kept=True),
    "plain hooks": plain_hooks,
    "NodiReFT by hooks": partial(plain_hooks, activation=None, normalize=False),
    "PEFT LoRA q, v": lora,
}
# Ours : the others, in turn.
OURS = tuple(name for name in IMPLEMENTATIONS if name.startswith("dive_fast"))
BASELINE = "plain hooks"


def operation_count(step: Step, name: str) -> float:
    """Least passes over tokens: 1 forward and 1 input gradient each, the prompt's forward alone or not at all.

    Only the backbone's; the head (on targets alone in ours, on every token in the others) comes on top.
    """
    if "kept" in name:
        return 2.0 * step.targets
    if "response" in name and name.startswith("dive_fast"):
        return step.tokens - step.targets + 2.0 * step.targets
    return 2.0 * step.tokens
