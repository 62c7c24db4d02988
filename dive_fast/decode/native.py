"""Decoding by the compiled engine: transformers runs the prompt, the engine everything behind it.

The prompt is run without its last token, which is the engine's first step (`prefill`).
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from dive_fast import native
from dive_fast.decode.plan import Plan, Unsupported, build_plan, dive_model_of
from dive_fast.decode.prefill import Prefill, Prefilled
from dive_fast.decode.prefix_cache import PrefixCache
from dive_fast.decode.stop import token_texts
from dive_fast.errors import InputError
from dive_fast.models.cache_argument import NAMES as CACHE_NAMES
from dive_fast.models.hidden import unwrapped
from dive_fast.steering import DiveModel

MAX_ROWS = 64
"""Rows of one step; more wait for their turn."""

# What a request is unless it says otherwise.
_REQUEST = {
    "streams": [0],
    "beams": 1,
    "length_penalty": 1.0,
    "early_stopping": "no",
    "stop": None,
    "forced": [],
    "forced_logits": 0,
}
# What would change the prompt's positions or embeddings behind the engine's back.
_UNKNOWN = ("inputs_embeds", "position_ids", *CACHE_NAMES, "cache_position", "decoder_input_ids")


# Tokenizer -> its `token_texts` and the engine's copy of them.
_texts: WeakKeyDictionary = WeakKeyDictionary()


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the fields are those of csrc/engine/sampler.h."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Search:
    """Beam search; one beam is none."""

    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    @property
    def early(self) -> str:
        """The extension's name for it."""
        return {False: "no", True: "yes"}.get(self.early_stopping, "never")


@dataclass(frozen=True)
class Row:
    """One result: its new tokens, their log-probabilities (empty if not asked for), "eos", "length", "stop" or
    "cancelled"."""

    tokens: list[int]
    log_probs: list[float]
    finish: str


class NativeDecoder:
    """A model that the engine can run, with the adapters that act now.

    Args:
        adapter_names: every row's adapter, "__base__" for none; None: the active ones on every row.
        weights: None multiplies with the model's matrices as they are, "int8" with 8-bit copies of them.

    Raises:
        Unsupported: the engine cannot run it; says why.
        InputError: no such adapter.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, adapter_names: Sequence[str] | None = None, weights: str | None = None):
        self.model = model
        self.dive: DiveModel | None = dive_model_of(model)
        self.acting: list[str] = []
        if self.dive is not None:
            with self.dive.rows_steered_by(adapter_names):
                self.acting = self.dive.acting_adapters()
        self.scopes = {name: self.dive.peft_config[name].scope for name in self.acting}
        steps = tuple(name for name in self.acting if self.scopes[name] != "prompt")
        try:
            self.extension = native.load()
        except InputError as error:
            raise Unsupported(str(error)) from error
        self.plan: Plan = build_plan(model, steps, int8=weights == "int8")
        self.compiled = self.extension.engine.Plan(self.plan.values, self.plan.kept)
        if self.plan.device.type == "cuda":
            _check_cuda(self.extension, self.plan.device, self.compiled)
        text = unwrapped(model).config
        self.image_tokens = {
            value
            for name in ("image_token_id", "image_token_index", "video_token_id")
            if isinstance(value := getattr(text, name, None), int)
        }
        self.prefill = Prefill(model, self.dive, self.scopes, self.image_tokens)

    def check(self, batch: dict) -> None:
        """Unsupported where the engine cannot run this batch."""
        for name, value in batch.items():
            if name in _UNKNOWN or not isinstance(value, torch.Tensor):
                raise Unsupported(f"inputs: it does not know what {name!r} would mean behind the prompt")
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if mask is not None and (mask.dim() != 2 or bool((mask[:, 1:] < mask[:, :-1]).any())):
            raise Unsupported("inputs: the attention_mask has holes behind a row's first token")
        if any(bool((ids[:, -1] == token).any()) for token in self.image_tokens):
            raise Unsupported("inputs: a prompt ends in an image")
        vocabulary = self.plan.values["vocabulary"]
        last = ids[:, -1]
        if bool(((last < 0) | (last >= vocabulary)).any()):
            raise InputError(
                f"inputs: input_ids holds {int(last.max())}, the model's vocabulary has {vocabulary} tokens"
            )

    def run(
        self,
        batches: Iterable[tuple[dict, Sequence[int], Sequence[str] | None]],
        *,
        max_rows: int,
        sampling: Sampling,
        eos: Iterable[int],
        min_new_tokens: int,
        max_new_tokens: int,
        log_probs: bool = False,
        samples: int = 1,
        search: Search = Search(),
        stop=None,
        on_token: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        prefixes: PrefixCache | None = None,
        seeds: Sequence[int] | None = None,
        threads: int | None = None,
        isa: str | None = None,
    ) -> dict[int, Row]:
        """Row number * samples + sample -> its outcome. `stats` then says how many steps it took.

        Args:
            batches: (a processor's output for left-padded prompts, the rows' numbers, their adapter names) each; taken
                one by one, whenever a row has become free.
            samples: results of each row; sample j of row i draws from stream i * samples + j of the seed.
            stop: what `stop_strings` returned.
            on_token: called with (the result's number, token) after every token, but not in a search.
            cancelled: asked now and then; once it is true the run ends, and rows not yet begun have no outcome.
            prefixes: where prompts that begin alike are looked up and stored.
            seeds: row number -> its own seed, in place of the sampling's: sample j draws from stream j of it.
            threads: the most to use on a CPU; None takes as many as torch does.
        """
        self.prefill.reused = 0
        session = self.session(max(max_rows, search.beams), threads, isa)
        numbers: list[int] = []
        request = {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "seed": sampling.seed,
            "eos": sorted(token for token in eos if 0 <= token < self.plan.values["vocabulary"]),
            "min_new_tokens": min_new_tokens,
            "max_new_tokens": max_new_tokens,
            "log_probs": log_probs,
            "beams": search.beams,
            "length_penalty": search.length_penalty,
            "early_stopping": search.early,
            "stop": stop,
        }
        calls = {
            "on_token": None if on_token is None else lambda index, token: on_token(numbers[index], token),
            "cancelled": cancelled,
        }
        for batch, rows, names in batches:
            if cancelled is not None and cancelled():
                break
            results = [range(row * samples, (row + 1) * samples) for row in rows]
            numbers += [number for own in results for number in own]
            draws = [
                {"streams": list(own)} if seeds is None else {"streams": list(range(samples)), "seed": seeds[row]}
                for row, own in zip(rows, results, strict=True)
            ]
            self.submit(session, batch, names, [request | own for own in draws], prefixes)
            if cancelled is not None and cancelled():
                session.cancel()
            _with_memory(session.run, **calls, until_free=search.beams)
        _with_memory(session.run, **calls, until_free=0)
        self.stats = {"steps": session.steps, "rows_per_step": session.rows_run / max(session.steps, 1)}
        if self.plan.device.type == "cuda":
            self.stats["loop"] = session.loop_form
        if prefixes is not None:
            # A cache that cannot keep what rows share makes them run it once more.
            self.stats["prompt_tokens_reused"] = max(0, self.prefill.reused)
        return {number: Row(*session.take(index)) for index, number in enumerate(numbers)}

    def stop_strings(self, tokenizer, stop: Sequence[str]):
        """For `run`: what ends a row whose text contains one of the strings.

        Raises:
            Unsupported: of this tokenizer's tokens it is not known what bytes they stand for.
        """
        if not stop:
            return None
        texts = token_texts(tokenizer)
        if tokenizer not in _texts or _texts[tokenizer][0] is not texts:
            _texts[tokenizer] = texts, self.extension.engine.TokenTexts(texts)
        return self.extension.engine.StopStrings(_texts[tokenizer][1], list(stop))

    def check_search(self, beams: int, eos: Iterable[int]) -> None:
        """Unsupported where the vocabulary has too few tokens for so many beams to go on in different ways."""
        ends, vocabulary = len(set(eos)), self.plan.values["vocabulary"]
        if beams > 1 and max(2, 1 + ends) * beams + ends > vocabulary:
            raise Unsupported(f"num_beams: a vocabulary of {vocabulary} tokens is too small for {beams} beams")

    def session(self, max_rows: int, threads: int | None = None, isa: str | None = None):
        """An empty session of the engine; on a GPU it has no use for threads and instruction sets."""
        on_gpu = self.plan.device.type == "cuda"
        return _with_memory(
            self.extension.engine.Session,
            plan=self.compiled,
            max_rows=min(max_rows, MAX_ROWS),
            threads=threads or torch.get_num_threads(),
            isa=isa or self.extension.cpu.kernel_levels()[-1],
            device=(self.plan.device.index or 0) if on_gpu else None,
        )

    @torch.no_grad()
    def submit(
        self, session, batch: dict, names: Sequence[str] | None, requests: Sequence[dict], prefixes=None
    ) -> None:
        """Run the batch's prompts, with a `PrefixCache` if given, and hand one request per row to the session."""
        self.check(batch)
        if not self.plan.in_place():
            raise InputError("model: the memory of a parameter was moved or freed while this decoder was in use")
        ids = batch["input_ids"].cpu()
        mask = batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask.cpu()
        inputs = {**batch, "attention_mask": mask}
        inputs = {name: value.to(self.plan.device) for name, value in inputs.items()}
        prefilled = self.prefill.run(inputs, names, prefixes)
        vocabulary = self.plan.values["vocabulary"]
        for row, (request, before) in enumerate(zip(requests, prefilled, strict=True)):
            prompt = ids[row, ids.shape[1] - int(mask[row].sum()) :].tolist()
            # Placeholder ids beyond the head's rows stand for images; no logit belongs to them.
            seen = [token for token in prompt[:-1] if token < vocabulary] + prompt[-1:]
            layers = [] if before is None else self._layers(before, len(prompt) - 1)
            _with_memory(
                session.submit,
                prompt=seen,
                prefilled=len(prompt) - 1,
                rope_offset=0 if before is None else before.rope_delta,
                adapters=self._adapters_of(None if names is None else names[row]),
                layers=[
                    (k.data_ptr(), v.data_ptr(), k.stride(0), k.stride(1), v.stride(0), v.stride(1)) for k, v in layers
                ],
                **_REQUEST | request,
            )

    def _adapters_of(self, name: str | None) -> list[int]:
        """The places in the plan of what steers a row."""
        index = self.plan.adapter_index
        return list(index.values()) if name is None else [index[name]] if name in index else []

    def _layers(self, prompt: Prefilled, count: int) -> list[tuple]:
        """(keys, values) of a prompt as the engine takes them: the cache's dtype, each head's columns side by side."""
        values = self.plan.values
        if len(prompt.layers) != len(values["layers"]):
            raise InputError(f"model: its cache has {len(prompt.layers)} layers, expected {len(values['layers'])}")
        expected = (values["kv_heads"], count, values["head_size"])
        return [tuple(self._ready(states, expected) for states in pair) for pair in prompt.layers]

    def _ready(self, states: torch.Tensor, expected: tuple) -> torch.Tensor:
        if tuple(states.shape) != expected or states.device != self.plan.device:
            raise InputError(
                f"model: its cache holds states of {tuple(states.shape)} on {states.device}, expected {expected} on "
                f"{self.plan.device}"
            )
        states = states.to(self.plan.cache_dtype)
        side_by_side = states.stride(2) == 1 and states.stride(1) >= states.shape[2]
        # A GPU reads 16 bytes at a time.
        places = (states.data_ptr(), *(stride * states.element_size() for stride in states.stride()[:2]))
        aligned = states.device.type == "cpu" or all(place % 16 == 0 for place in places)
        return states if side_by_side and aligned else states.contiguous()


def _check_cuda(extension, device: torch.device, plan) -> None:
    """Unsupported unless this build of the extension can run the plan on that device."""
    if not extension.cuda.built():
        raise Unsupported(f"the decoder lies on {device}, and the extension was built without CUDA (no nvcc was found)")
    covered = _covered(device.index or 0)
    if covered is not None:
        raise Unsupported(f"the decoder lies on {device}: {covered}; `dive-fast doctor` says more")
    refusal = extension.engine.refusal_of_cuda(plan)
    if refusal:
        raise Unsupported(f"on a GPU it cannot run this decoder: {refusal}")


@functools.cache
def _covered(index: int) -> str | None:
    """Why the extension cannot run on that CUDA device, None where it can."""
    found = native.load().cuda.devices()
    if not found["status"]["ok"]:
        return found["status"]["message"]
    for gpu in found["devices"]:
        if gpu["index"] == index:
            return None if gpu["covered"]["ok"] else gpu["covered"]["message"]
    return f"the extension sees {len(found['devices'])} CUDA devices"


def _with_memory(call: Callable, **arguments):
    """The call; where a GPU has too little memory, once more behind giving back what torch keeps for later.

    Raises:
        torch.OutOfMemoryError: what was needed, for what, and what would lower it.
    """
    try:
        return call(**arguments)
    except RuntimeError as error:
        if not str(error).startswith("CUDA: out of memory"):
            raise
    torch.cuda.empty_cache()
    try:
        return call(**arguments)
    except RuntimeError as error:
        if not str(error).startswith("CUDA: out of memory"):
            raise
        raise torch.OutOfMemoryError(str(error)) from None
