"""The teacher: the same frozen model with demonstrations in its context.

Its distribution over a report's tokens is kept as D + 2 numbers and its K most probable tokens, from which the KL
divergence to any student with the same head is exact (see `dive_fast.ops.teacher_statistics`).

N response tokens, D hidden size, K most probable tokens, L layers.
"""

import json
import os
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from dive_fast import ops
from dive_fast.data import to_records
from dive_fast.data.demonstrations import DemonstrationPool
from dive_fast.data.encoding import ReportEncoder, append_responses
from dive_fast.data.record import Record
from dive_fast.errors import InputError
from dive_fast.models.fingerprint import forward_settings, model_fingerprint
from dive_fast.models.head import head_of
from dive_fast.models.hidden import hidden_states
from dive_fast.models.modes import evaluating
from dive_fast.models.prefix import Prefix, can_run_prefixes, continue_prefix, run_prefix
from dive_fast.supervision.cache import TensorCache, content_key

DEMOS = ("random", "nearest", "fixed")


@dataclass
class Teacher:
    """Settings of the teacher.

    Args:
        shots: demonstrations in its context, >= 1.
        demos: "random" (drawn per record), "nearest" (most similar prompts) or "fixed" (the same for all records).
            A record never sees itself, its own report text or its own patient.
        cache_dir: folder for its results, so that later epochs and runs need no teacher pass; None: kept in memory, up
            to `memory_bytes`.
        pool: records to draw from, in every form that `train_dataset` may have; None: the training set.
        seed: of the draw.

    Raises:
        InputError: shots below 1, an unknown `demos`, negative memory_bytes, a seed or a folder of another type, a pool
            that holds no records.
    """

    shots: int = field(default=8, metadata={"help": "demonstrations in the teacher's context"})
    demos: str = field(default="random", metadata={"help": f"one of {', '.join(DEMOS)}"})
    cache_dir: str | None = field(default=None, metadata={"help": "folder that keeps the teacher's results"})
    pool: Sequence[Record] | None = field(default=None, repr=False, metadata={"help": "records to draw from"})
    seed: int = field(default=0, metadata={"help": "of the draw"})
    memory_bytes: int = field(default=2**30, metadata={"help": "results kept in memory where there is no cache_dir"})

    def __post_init__(self):
        if isinstance(self.shots, bool) or not isinstance(self.shots, int) or self.shots < 1:
            raise InputError(f"shots: a teacher needs at least 1 demonstration, got {self.shots!r}")
        if isinstance(self.memory_bytes, bool) or not isinstance(self.memory_bytes, int) or self.memory_bytes < 0:
            raise InputError(f"memory_bytes: expected a whole number >= 0, got {self.memory_bytes!r}")
        if self.demos not in DEMOS:
            raise InputError(f"demos: expected one of {', '.join(DEMOS)}, got {self.demos!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InputError(f"seed: expected a whole number, got {self.seed!r}")
        if self.cache_dir is not None and not isinstance(self.cache_dir, str | os.PathLike):
            raise InputError(f"cache_dir: expected a folder or None, got {self.cache_dir!r}")
        if self.pool is not None:
            self.pool = to_records(self.pool, "pool")

    def demonstration_pool(self, train_records: Sequence[Record]) -> DemonstrationPool:
        pool = train_records if self.pool is None else self.pool
        return DemonstrationPool(pool, self.shots, self.demos, self.seed)


class TeacherTargets(NamedTuple):
    """What one report's supervision holds of the teacher; all on the CPU, `None` where it was not asked for.

    Attributes:
        statistics: of the next-token distributions, rows [N]; or
        final: final hidden states [N, D], for heads with a logit softcap, to which the statistics do not apply.
        layers: residual streams [L, N, D].
        disagreement: KL(teacher || zero-shot) [N].
    """

    statistics: ops.TeacherStatistics | None = None
    final: torch.Tensor | None = None
    layers: torch.Tensor | None = None
    disagreement: torch.Tensor | None = None


class TeacherRunner:
    """Runs the teacher report by report and remembers its results.

    One report at a time, so that a result never depends on its batch: a resumed run meets the same bits. Prompts with
    demonstrations are long enough to fill the machine alone. Where the demonstrations are fixed and text, they are run
    once: a report then costs its own prompt and itself.

    Args:
        model: the frozen model, with or without adapters (they are off in here).
        encoder: of the model.
        pool: where demonstrations come from.
        layers, disagreement: whether targets hold them.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder: ReportEncoder,
        pool: DemonstrationPool,
        *,
        cache_dir: str | None = None,
        memory_bytes: int = 2**30,
        layers: bool = False,
        disagreement: bool = False,
    ):
        self.model, self.encoder, self.pool = model, encoder, pool
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.head = head_of(base)
        self.layers, self.disagreement = layers, disagreement
        self.cache = TensorCache(cache_dir) if cache_dir is not None else None
        self.fingerprint = _fingerprint(base) if self.cache is not None else ""
        self.memory: dict[str, dict[str, torch.Tensor]] = {}
        self.memory_left = memory_bytes
        self.passes = 0
        self.shared: tuple[torch.Tensor, Prefix | None] | None = None  # what all prompts begin with; run when needed

    def targets(self, record: Record) -> TeacherTargets:
        """The teacher's targets for one record, from memory, from disk or computed."""
        tensors = self.memory.get(record.id)
        if tensors is None:
            prompt = self.encoder.prompts([record], [self.pool.for_record(record)])
            response = self.encoder.response(record.report).ids
            key = self._key(prompt, response)
            tensors = None if self.cache is None else self.cache.load(key)
            if tensors is None:
                tensors = self._compute(record, prompt, response)
                if self.cache is not None:
                    self.cache.store(key, tensors)
            self._remember(record.id, tensors)
        return TeacherTargets(
            _statistics(tensors), tensors.get("final"), tensors.get("layers"), tensors.get("disagreement")
        )

    def _key(self, prompt: dict, response: Sequence[int]) -> str:
        wanted = f"layers={self.layers} disagreement={self.disagreement} {self.head.softcap=} {self.head.scale=}"
        return content_key({**prompt, "response": torch.tensor(response), "model": self.fingerprint, "wanted": wanted})

    def _remember(self, record_id: str, tensors: dict[str, torch.Tensor]) -> None:
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if size <= self.memory_left:
            self.memory[record_id] = tensors
            self.memory_left -= size

    def _compute(self, record: Record, prompt: dict, response: Sequence[int]) -> dict[str, torch.Tensor]:
        self.passes += 1
        length = prompt["input_ids"].shape[1] + len(response)
        limit = self.encoder.context_length
        if limit is not None and length > limit:
            raise InputError(
                f"shots: the teacher's prompt and report for record {record.id!r} have {length} tokens, "
                f"the model's context has {limit}; use fewer demonstrations than {self.pool.shots}"
            )
        with torch.no_grad(), without_steering(self.model):
            states = self._response_states(prompt, response, layers=self.layers)
            if self.head.softcap is None:
                statistics = ops.teacher_statistics(states.final, self.head.weight, bias=self.head.options["bias"])
                tensors = statistics._asdict()
            else:
                tensors = {"final": states.final}
            if self.layers:
                tensors["layers"] = torch.stack([layer.to(states.final.device) for layer in states.layers])
            if self.disagreement:
                alone = self._response_states(self.encoder.prompts([record]), response)
                tensors["disagreement"] = self._divergence(tensors, alone.final, response)
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    def _response_states(self, prompt: dict, response: Sequence[int], layers: bool = False):
        """Hidden states at the positions that predict the response: [N, D] each."""
        device = self.head.weight.device
        batch = append_responses(prompt, [list(response)], self.encoder.pad_token_id)
        batch.pop("labels")
        batch = {k: v.to(device) for k, v in batch.items()}
        begun, prefix = self._shared_prefix(batch)
        if prefix is None:
            states = hidden_states(self.model, batch, layers=layers)
        else:
            rest = {name: values[:, begun:] for name, values in batch.items()}
            states = continue_prefix(self.model, prefix, **rest, layers=layers)
        first = batch["input_ids"].shape[1] - begun - len(response) - 1
        window = slice(first, first + len(response))
        states.final = self.head.inputs(states.final[0, window])
        states.layers = [layer[0, window] for layer in states.layers]
        return states

    def _shared_prefix(self, batch: dict) -> tuple[int, Prefix | None]:
        """The tokens that `batch` has in common with every prompt, and their cache; (0, None) where it has none."""
        if self.pool.how != "fixed" or batch.keys() != {"input_ids", "attention_mask"}:
            return 0, None
        if not can_run_prefixes(self.model):
            return 0, None
        if self.shared is None:
            self.shared = self._common_tokens().to(batch["input_ids"].device), None
        tokens, prefix = self.shared
        if len(tokens) == 0 or not torch.equal(batch["input_ids"][0, : len(tokens)], tokens):
            return 0, None  # one of the demonstrations was replaced, because it would have leaked
        if prefix is None:
            whole = {"input_ids": tokens[None], "attention_mask": torch.ones_like(tokens)[None]}
            self.shared = tokens, run_prefix(self.model, whole)
        return len(tokens), self.shared[1]

    def _common_tokens(self) -> torch.Tensor:
        """What the prompts of two records that nobody has begin with; the same in every run, whichever comes first."""
        strangers = [Record(f"no record {text}", text, text) for text in ("A", "B")]
        demonstrations = self.pool.for_record(strangers[0])
        if any(record.images for record in demonstrations):
            return torch.empty(0, dtype=torch.long)
        first, second = (self.encoder.prompts([r], [demonstrations])["input_ids"][0] for r in strangers)
        length = min(len(first), len(second))
        common = int((first[:length] == second[:length]).cumprod(dim=0).sum())
        # The tokens next to the difference may be cut in another way in front of another text.
        return first[: max(0, common - 2)]

    def _divergence(self, tensors: dict, zero_shot: torch.Tensor, response: Sequence[int]) -> torch.Tensor:
        teacher = tensors.get("final")
        if teacher is None:
            teacher = _statistics(tensors)
        _, stats = ops.linear_cross_entropy(
            zero_shot,
            self.head.weight,
            torch.tensor(response, device=zero_shot.device),
            **self.head.options,
            teacher=teacher,
            kl_weight=1.0,
            return_stats=True,
        )
        return stats.kl


def _fingerprint(model: nn.Module) -> str:
    return f"{model_fingerprint(model)} {json.dumps(forward_settings(model), sort_keys=True)}"


def _statistics(tensors: dict[str, torch.Tensor]) -> ops.TeacherStatistics | None:
    fields = ops.TeacherStatistics._fields
    return ops.TeacherStatistics(*(tensors[name] for name in fields)) if fields[0] in tensors else None


@contextmanager
def without_steering(model: nn.Module):
    """The base model inside `model`, whatever PEFT method adapts it, in eval mode."""
    with evaluating(model), _adapters_off(model):
        yield


def _adapters_off(model: nn.Module):
    if not hasattr(model, "peft_config"):
        return nullcontext()
    return model.base_model.unsteered() if hasattr(model.base_model, "unsteered") else model.disable_adapter()


def disagreement_weights(disagreement: torch.Tensor, fraction: float, weight: float) -> torch.Tensor:
    """Extra weight [N] on the `fraction` of a report's tokens (EOS, the last, aside) with the largest disagreement."""
    extra = torch.zeros_like(disagreement)
    count = max(1, round(fraction * (len(disagreement) - 1))) if len(disagreement) > 1 else 0
    extra[torch.topk(disagreement[:-1], count).indices] = weight
    return extra
