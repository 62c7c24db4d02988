"""What the decode group measures: prompts, adapters, the bytes that a step cannot do without, and the true logits.

B rows, P prompt tokens, N new tokens, D hidden size, V vocabulary.
"""

import copy
import functools
from dataclasses import dataclass

import peft
import torch
from transformers import PreTrainedModel

from benchmarks.decode_models import CONFIGS, random_model
from dive_fast import DiveConfig, native
from dive_fast.models.backbone import load_backbone
from dive_fast.models.spec import text_config_of
from dive_fast.models.tiny import tiny_llama

# Of an adapter's matrices and of its vectors and numbers: the push is felt, and thirty in a row do not drive the model
# out of its range.
MATRIX_SPREAD, VECTOR_SPREAD = 0.02, 0.3
# Rows: of a large batch some, since all of a 7-billion model's in float32 take longer than what is measured.
CHECKED_TOKENS, CHECKED_ROWS = 16, 8
COPY_BYTES = 2 * 2**30  # of each of the two buffers: 40 times an H100's L2 cache
# Relative to the largest logit, as in tests/test_engine.py.
FLOAT32_TOLERANCE, NEAR_TIE = 1e-4, 1e-5
# How far the largest of two sets of errors of one kind may lie apart.
EXTREMES = 2.0
# Nats of KL divergence for what is approximate by design (8- and 4-bit arithmetic); a wrong layer costs whole nats.
APPROXIMATE_TOLERANCE = 0.1


@dataclass(frozen=True)
class Problem:
    """A backbone that continues B prompts; it never ends a row by itself.

    Attributes:
        backbone: "smollm2" (a 135M model of 30 layers), "tiny" (random, 2 layers) or one of `CONFIGS` (random, large).
        dtype: of weights and cache.
    """

    backbone: str
    rows: int
    dtype: torch.dtype = torch.bfloat16
    prompt_tokens: int = 128
    new_tokens: int = 32
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.backbone}-{str(self.dtype)[6:]}-B{self.rows}"


@dataclass(frozen=True)
class Steering:
    """Adapters on every layer: one on all rows or, if `different`, one for each row of the batch."""

    kind: str | None = None
    rank: int = 16
    different: bool = False

    def __str__(self) -> str:
        if self.kind is None:
            return "unsteered"
        rank = f"-r{self.rank}" if self.kind in ("lowrank", "reft") else ""
        return f"{self.kind}{rank}{'-different' if self.different else ''}"


UNSTEERED = Steering()


def base_model(problem: Problem) -> PreTrainedModel:
    """The frozen model, without an end of sequence; kept until there are two others."""
    return _base_model(problem.backbone, problem.dtype, problem.device)


@functools.lru_cache(maxsize=2)
def _base_model(backbone: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    if backbone in CONFIGS:
        model = random_model(backbone, dtype, device)
    else:
        model = tiny_llama().to(dtype) if backbone == "tiny" else load_backbone(backbone, dtype=dtype)[0]
        model = model.to(device)
    model.generation_config.eos_token_id = None
    return model


def make_model(problem: Problem, steering: Steering):
    """(the model with its adapters, the adapters' names by row or None); all such models share the frozen weights."""
    base = base_model(problem)
    model = copy.deepcopy(base, {id(weight): weight for weight in base.parameters()})
    if steering.kind is None:
        return model, None
    config = DiveConfig(kind=steering.kind, **({"r": steering.rank} if "-r" in str(steering) else {}))
    names = [f"adapter{row}" for row in range(problem.rows if steering.different else 1)]
    # Seeded, so that the model that checks another one has its adapters.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config, names[0])
        for name in names[1:]:
            model.add_adapter(name, copy.deepcopy(config))
        for name, parameter in model.named_parameters():
            if "dive_" in name:
                spread = MATRIX_SPREAD if parameter.dim() > 1 else VECTOR_SPREAD
                parameter.add_((torch.randn(parameter.shape) * spread).to(parameter.device))
    return model.eval(), names if steering.different else None


def prompts(problem: Problem) -> dict[str, torch.Tensor]:
    """Random tokens, of one length: what they say does not change the work."""
    vocabulary = text_config_of(base_model(problem)).vocab_size
    shape = (problem.rows, problem.prompt_tokens)
    ids = torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(0)).to(problem.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def cache_bytes(problem: Problem, itemsize: int) -> int:
    """Keys and values that one step reads, in the middle of the run."""
    text = text_config_of(base_model(problem))
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    position = 2 * text.num_key_value_heads * head_size * itemsize
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    before = problem.prompt_tokens + (problem.new_tokens - 1) / 2
    seen = [min(text.sliding_window, before) if kind == "sliding_attention" else before for kind in kinds]
    return int(problem.rows * position * sum(seen))


def weight_bytes(model: torch.nn.Module) -> int:
    """The weights that every step reads: all but rows of an embedding that is not also the head."""
    weights = {id(weight): weight.nbytes for name, weight in model.named_parameters() if "dive_" not in name}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(weights.values()) - (0 if embedding is head else embedding.nbytes)


class ReadLimit:
    """Reading as many bytes as a decoding run must, N times a step's: the time that nothing can go below.

    Read are the backbone's own weights where they are meant and lie in one piece, so that pages and their places are
    the same ones, else as much memory as the weights take, of torch's allocator.
    """

    def __init__(self, problem: Problem, weights: int, step: int):
        self.bytes = problem.new_tokens * step
        self.kept = sorted(base_model(problem).parameters(), key=torch.Tensor.data_ptr)
        self.address = self.kept[0].data_ptr()
        self.size = self.kept[-1].data_ptr() + self.kept[-1].nbytes - self.address
        if abs(self.size / weights - 1) > 0.01:
            self.kept = torch.empty(weights, dtype=torch.uint8).fill_(1)
            self.address, self.size = self.kept.data_ptr(), weights
        self.cpu = native.load().cpu
        self.level, self.threads = self.cpu.kernel_levels()[-1], torch.get_num_threads()

    def __call__(self) -> None:
        for start in range(0, self.bytes, self.size):
            self.cpu.decode.read_memory(self.address, min(self.size, self.bytes - start), self.level, self.threads)


class CopyLimit:
    """Moving as many bytes on a GPU as a decoding run must read, N times a step's, by copies that read and write half.

    Reading alone is a little faster than that; a copy is what a GPU's bandwidth is usually measured by.
    """

    def __init__(self, problem: Problem, step: int):
        self.half = problem.new_tokens * step // 2
        self.source = torch.ones(min(self.half, COPY_BYTES), dtype=torch.uint8, device=problem.device)
        self.target = torch.empty_like(self.source)

    def __call__(self) -> None:
        for start in range(0, self.half, len(self.source)):
            count = min(len(self.source), self.half - start)
            self.target[:count].copy_(self.source[:count])


@torch.no_grad()
def one_pass(model, names, problem: Problem, forced: torch.Tensor) -> torch.Tensor:
    """transformers' logits [B, N, V] of the steps that take the tokens `forced`: one pass without a cache.

    With tokens of fewer rows than the problem's, of the first ones.
    """
    rows = len(forced)
    ids = torch.cat([prompts(problem)["input_ids"][:rows], forced[:, :-1].to(problem.device)], dim=1)
    more = {} if names is None else {"adapter_names": names[:rows]}
    if hasattr(model, "peft_config"):
        positions = torch.arange(ids.shape[1], device=problem.device) >= problem.prompt_tokens - 1
        more["response_positions"] = positions.expand(rows, -1)
    return model(input_ids=ids, use_cache=False, logits_to_keep=forced.shape[1], **more).logits


@dataclass(frozen=True)
class Errors:
    """How far an implementation's logits lie from the same model's in float64, and how its tokens do.

    Attributes:
        largest, mean: of the logits' absolute errors, relative to the largest true logit.
        kl: mean KL divergence of the next token's distribution, in nats.
        shortfall: by how much a taken token's true logit stays below the largest one, at most; relative as well.
    """

    largest: float
    mean: float
    kl: float
    shortfall: float


def errors(logits: torch.Tensor, exact: torch.Tensor, taken: torch.Tensor) -> Errors:
    """Of logits [B, N, V] at the tokens that were taken, [B, N]."""
    logits, taken, scale = logits.to(exact.device), taken.to(exact.device), exact.abs().max()
    difference = (logits.double() - exact).abs()
    p, q = exact.log_softmax(-1), logits.double().log_softmax(-1)
    short = exact.amax(-1) - exact.gather(-1, taken[..., None]).squeeze(-1)
    return Errors(
        float(difference.max() / scale),
        float(difference.mean() / scale),
        float((p.exp() * (p - q)).sum(-1).mean()),
        float(short.max() / scale),
    )


def _precise(model: torch.nn.Module, problem: Problem) -> torch.nn.Module:
    """In float64; of large models in float32, which fits beside them, and is half-precision's truth as well."""
    large = problem.backbone in CONFIGS and problem.dtype != torch.float32
    return model.float() if large else model.double()


def check(decoding, approximate: bool, problem: Problem, steering: Steering, rows: int = CHECKED_ROWS) -> Errors:
    """The errors of the first rows of what is about to be timed; written so that NaN fails."""
    decoding.prepare()
    tokens = torch.tensor(decoding())
    assert tokens.shape == (problem.rows, problem.new_tokens), f"tokens {tuple(tokens.shape)}"
    forced = tokens[:, :CHECKED_TOKENS]
    taken = forced[:rows]
    model, names = make_model(problem, steering)
    exact = one_pass(_precise(copy.deepcopy(model), problem), names, problem, taken).double()
    found = errors(decoding.logits(forced)[:rows], exact, taken)
    # The logits are of tokens that are given, the tokens of a run with its cache. Two logits may change places where
    # they lie no farther apart than both their errors.
    if approximate:
        assert found.kl <= APPROXIMATE_TOLERANCE, f"wrong by {found.kl:.2g} nats"
        may_fall_short = 2 * EXTREMES * found.largest
    elif problem.dtype == torch.float32:
        assert found.largest <= FLOAT32_TOLERANCE, f"wrong by {found.largest:.2g}"
        may_fall_short = NEAR_TIE
    else:
        # Of as many rows, since products of other sizes round otherwise.
        theirs = errors(one_pass(model, names, problem, forced)[:rows], exact, taken)
        assert found.mean <= theirs.mean and found.largest <= EXTREMES * theirs.largest, f"{found} beyond {theirs}"
        may_fall_short = 2 * EXTREMES * theirs.largest
    assert found.shortfall <= may_fall_short, (
        f"a token falls short by {found.shortfall:.2g}, beyond {may_fall_short:.2g}"
    )
    return found
