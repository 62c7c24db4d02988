"""`dive_fast.generate`: reports from prompts, by the compiled engine or by transformers' `generate`.

B batch rows, T prompt tokens.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dive_fast.data.encoding import ReportEncoder
from dive_fast.data.record import Record
from dive_fast.decode.hf import run_batch
from dive_fast.decode.inputs import batches_of, check_room
from dive_fast.decode.native import NativeDecoder, Row, Sampling, Search
from dive_fast.decode.options import Options
from dive_fast.decode.plan import Unsupported
from dive_fast.decode.prefix_cache import PrefixCache
from dive_fast.errors import InputError
from dive_fast.models.hidden import unwrapped
from dive_fast.models.modes import evaluating
from dive_fast.models.spec import decoder_of, text_config_of

ENGINES = ("native", "transformers")


@dataclass
class GenerateOutput:
    """What `generate` returns: n = `num_return_sequences` entries per row, row i's from i * n on.

    Attributes:
        sequences: 1-D int64 tensors on the CPU: the new tokens only, no padding; an EOS that was produced is included,
            and so is the token that completed a stop string.
        texts: the decoded sequences without special tokens, cut right before a stop string; None without a processor.
        finish_reasons: "eos", "stop" (a stop string), "length" where `max_new_tokens` ended the row, or "cancelled".
        stats: engine ("native" or "transformers"), rows, prompt_tokens, new_tokens, seconds, tokens_per_second (new
            tokens over wall time, prefill included); not_native: why engine=None did not take the native one; of the
            native one also steps, rows_per_step and, with a prefix_cache, prompt_tokens_reused; on a GPU loop: "on the
            device", or "..., step by step" where its driver cannot repeat steps by itself.
        log_probs: float32, one per token of `sequences`, if asked for.
    """

    sequences: list[torch.Tensor]
    texts: list[str] | None
    finish_reasons: list[str]
    stats: dict
    log_probs: list[torch.Tensor] | None = None


def generate(
    model: nn.Module,
    inputs,
    *,
    processor=None,
    max_new_tokens: int = 256,
    min_new_tokens: int = 0,
    engine: str | None = None,
    adapter_names: Sequence[str] | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] | None = None,
    num_return_sequences: int = 1,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    stop: Sequence[str] = (),
    streamer=None,
    log_probs: bool = False,
    weights: str | None = None,
    cancel=None,
    prefix_cache: PrefixCache | None = None,
    batch_size: int = 8,
    demonstrations: Sequence[Sequence[Record]] | None = None,
) -> GenerateOutput:
    """Generate a report for every input.

    Args:
        model: a transformers model or a PEFT model, steered or not.
        inputs: a processor's output (a mapping with input_ids, attention_mask, pixel_values, ...; left-padded), or a
            list of records, or of prompts as plain text, which go through the chat template; one of either also alone.
        processor: needed for records and prompts, for `stop`, and for `texts`; a model of `dive_fast.load(name, ...)`
            has its own.
        max_new_tokens, min_new_tokens: bounds on the new tokens, EOS included.
        engine: "native" (the compiled engine: the decoder families it knows, on a CPU or a CUDA device),
            "transformers" (anything), or None: the first where it applies, else the second. On a GPU None takes
            transformers: one has run the engine, but not yet its present kernels, so there it has to be asked for.
        adapter_names: one adapter name per row, "__base__" for none (PEFT's convention).
        temperature: 0 is greedy; otherwise the softmax temperature of sampling.
        top_k, top_p, min_p: keep the k most likely tokens (0: all); the fewest that reach probability top_p; those with
            at least min_p times the probability of the likeliest. Sampling only, in this order.
        repetition_penalty: > 0; 1 changes nothing.
        seed: of the sampling; None draws on. With the native engine a row's draws depend on the seed and its place
            among the inputs alone, so not on batch_size. A sequence has one seed per row, and place counts no more:
            a row's draws depend on its own seed (native), or on the seeds of the rows it runs with (transformers).
        num_return_sequences: results per row: as many samples (temperature > 0), or the best beams of a search.
        num_beams: 2 ... 8 search for the likeliest sequence with so many beams, as transformers does; temperature must
            be 0. length_penalty: finished beams are ranked by log-probability / tokens ** length_penalty.
            early_stopping: True ends a row's search with its num_beams-th finished beam; False where the best running
            one is no better as it is; "never" where it cannot become better.
        stop: a row ends as soon as the text of its new tokens contains one of these strings, wherever in a token it
            ends; special tokens are no text.
        streamer: a transformers streamer, for a single row and result, without beams.
        log_probs: also return every token's log-probability under the model's logits, before anything shapes them.
        weights: "int8" multiplies with 8-bit copies of the decoder's matrices and of the head (one scale per row), made
            by the first call and kept with the model: less to read per token, and so faster, for a small loss of
            precision. The prompt still runs with the model's own. Native engine only.
        cancel: a threading.Event. Once it is set, by another thread, generation ends within a step (or the prompts'
            own pass) and what there is is returned.
        prefix_cache: a `dive_fast.PrefixCache`: what prompts begin with alike (an instruction, demonstrations) is run
            once, for all rows and calls that share the cache. The native engine uses it; transformers runs every
            prompt whole.
        batch_size: rows run together where records or prompts are given.
        demonstrations: per row, the demonstrations in its context (the k-shot teacher).

    Raises:
        InputError: an argument out of range; a prompt that leaves no room for `max_new_tokens` in the model's context;
            prompts without a processor; engine="native" for what that engine cannot run, with the reason.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model: expected a transformers or PEFT model, got {type(model).__name__}; "
            "dive_fast.models.backbone.load_backbone loads one by its name, dive_fast.load one with an adapter"
        )
    if engine not in (None, *ENGINES):
        raise InputError(f"engine: expected None or {', '.join(map(repr, ENGINES))}, got {engine!r}")
    options = Options(
        max_new_tokens, min_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, num_return_sequences,
        num_beams, length_penalty, early_stopping, stop, log_probs, weights,
    )  # fmt: skip
    processor = getattr(model, "processor", None) if processor is None else processor
    context = getattr(text_config_of(unwrapped(model)), "max_position_embeddings", None)
    encoder = None if processor is None else ReportEncoder(processor, context_length=context)
    pad = _pad_id(model, encoder)
    batches, order = batches_of(inputs, encoder, batch_size, demonstrations, pad, options.max_new_tokens)
    _check_rows(model, len(order), options, encoder, adapter_names, streamer, seed, cancel, prefix_cache)
    call = _Call(model, encoder, options, context, adapter_names, streamer, cancel, prefix_cache, order)
    start = time.perf_counter()
    with evaluating(model):
        decoder, stats = _native_decoder(engine, call, inputs)
        if decoder is None:
            found = _by_transformers(call, batches, seed)
        else:
            seed = call.drawn_seed(seed)
            found = _by_engine(call, decoder, batches, seed, len(order) if isinstance(inputs, Mapping) else batch_size)
            stats |= decoder.stats
    return _output(call, found, stats, time.perf_counter() - start)


@dataclass
class _Call:
    """One call of `generate`, after its arguments were checked."""

    model: nn.Module
    encoder: ReportEncoder | None
    options: Options
    context: int | None
    adapter_names: Sequence[str] | None
    streamer: object
    cancel: object
    prefixes: PrefixCache | None
    order: list[int]
    prompt_tokens: int = 0
    stop: object = None

    def __post_init__(self):
        self.eos = _eos_ids(self.model, self.encoder)

    @property
    def cancelled(self) -> Callable[[], bool] | None:
        return None if self.cancel is None else self.cancel.is_set

    def drawn_seed(self, seed: int | Sequence[int] | None) -> int | Sequence[int]:
        """Without a seed the draws follow torch's generator, as everything random in a torch program does."""
        if seed is None and self.options.temperature > 0:
            return int(torch.randint(2**63 - 1, ()))
        return 0 if seed is None else seed

    def batches(self, batches):
        """(batch, its rows' positions among the inputs, their adapter names), each checked for room."""
        done = 0
        for batch in batches:
            rows = self.order[done : done + batch["input_ids"].shape[0]]
            done += len(rows)
            self.prompt_tokens += check_room(batch, self.context, self.options.max_new_tokens)
            names = None if self.adapter_names is None else [self.adapter_names[row] for row in rows]
            yield batch, rows, names


def _native_decoder(engine: str | None, call: _Call, inputs) -> tuple[NativeDecoder | None, dict]:
    """(the engine's decoder, what to say of it), or (None, why it is not the engine that runs)."""
    weights = call.options.weights
    if engine == "transformers":
        if weights is not None:
            raise InputError(f"weights: {weights!r} needs the native engine, and engine is 'transformers'")
        return None, {"engine": "transformers"}
    try:
        device = next(_decoder_of(unwrapped(call.model)).parameters()).device
        if engine is None and weights is None and device.type == "cuda":
            raise Unsupported(f"on a GPU ({device}) it runs where engine='native' asks")
        _refuse_rules(call)
        decoder = NativeDecoder(call.model, call.adapter_names, weights)
        if isinstance(inputs, Mapping):
            decoder.check(inputs)
        if call.options.stop:
            call.stop = decoder.stop_strings(call.encoder.tokenizer, call.options.stop)
        decoder.check_search(call.options.num_beams, call.eos)
        return decoder, {"engine": "native"} | ({} if weights is None else {"weights": weights})
    except Unsupported as reason:
        if weights is not None:
            raise InputError(f"weights: {weights!r} needs the native engine, which cannot run this: {reason}") from None
        if engine == "native":
            raise InputError(f"engine: 'native' cannot run this: {reason}. engine=None runs it anyway") from None
        return None, {"engine": "transformers", "not_native": str(reason)}


def _decoder_of(base: nn.Module) -> nn.Module:
    try:
        return decoder_of(base)
    except InputError as error:
        raise Unsupported(f"{type(base).__name__} has no decoder with a list of layers") from error


# What a model's own generation configuration may ask of its tokens beside the arguments of `generate`, with the values
# that ask for nothing.
_RULES = dict.fromkeys(
    ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "constraints", "sequence_bias"),
    (None, [], {}),
) | {
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "diversity_penalty": (None, 0.0),
    "min_length": (None, 0),
    "guidance_scale": (None, 1.0),
    "watermarking_config": (None,),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "renormalize_logits": (None, False),
}
_RULES_OF_SAMPLING = {"typical_p": (None, 1.0), "epsilon_cutoff": (None, 0.0), "eta_cutoff": (None, 0.0)}


def _refuse_rules(call: _Call) -> None:
    """transformers follows the rules of the model's own generation configuration; this engine has none of them."""
    config = getattr(unwrapped(call.model), "generation_config", None)
    rules = _RULES | (_RULES_OF_SAMPLING if call.options.temperature > 0 else {})
    for name, neutral in rules.items():
        value = getattr(config, name, None)
        if value not in neutral:
            raise Unsupported(f"the model's generation_config has {name}={value!r}")


def _by_engine(call: _Call, decoder: NativeDecoder, batches, seed, max_rows: int) -> dict[int, Row]:
    options, streamer, on_token = call.options, call.streamer, None
    if streamer is not None:

        def on_token(row: int, token: int) -> None:
            streamer.put(torch.tensor([token]))

    def shown(batches):
        for batch, rows, names in batches:
            if streamer is not None:
                streamer.put(batch["input_ids"].cpu())
            yield batch, rows, names

    shape = (options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty)
    seeds = seed if isinstance(seed, list | tuple) else None
    found = decoder.run(
        shown(call.batches(batches)),
        max_rows=max_rows * max(options.num_beams, options.num_return_sequences),
        sampling=Sampling(*shape, seed=0 if seeds is not None else seed),
        seeds=seeds,
        eos=call.eos,
        min_new_tokens=options.min_new_tokens,
        max_new_tokens=options.max_new_tokens,
        log_probs=options.log_probs,
        samples=options.num_return_sequences,
        search=Search(options.num_beams, options.length_penalty, options.early_stopping),
        stop=call.stop,
        on_token=on_token,
        cancelled=call.cancelled,
        prefixes=call.prefixes,
    )
    if streamer is not None:
        streamer.end()
    return found


def _by_transformers(call: _Call, batches, seed) -> dict[int, Row]:
    samples = call.options.num_return_sequences
    pad = call.encoder.pad_token_id if call.encoder is not None else min(call.eos, default=0)
    if call.options.temperature > 0 and isinstance(seed, int):
        torch.manual_seed(seed)
    found: dict[int, Row] = {}
    for batch, rows, names in call.batches(batches):
        if call.cancel is not None and call.cancel.is_set():
            break
        if isinstance(seed, list | tuple):
            # One generator serves the whole batch.
            text = " ".join(str(seed[row]) for row in rows)
            torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1)
        done = run_batch(
            call.model,
            batch,
            call.options,
            eos=call.eos,
            pad=pad,
            adapter_names=names,
            streamer=call.streamer,
            tokenizer=None if call.encoder is None else call.encoder.tokenizer,
            cancelled=call.cancelled,
        )
        found |= {rows[i // samples] * samples + i % samples: row for i, row in enumerate(done)}
    return found


def _output(call: _Call, found: dict[int, Row], stats: dict, seconds: float) -> GenerateOutput:
    # Rows that were cancelled before their turn have nothing.
    results = [
        found.get(i, Row([], [], "cancelled")) for i in range(len(call.order) * call.options.num_return_sequences)
    ]
    new_tokens = sum(len(row.tokens) for row in results)
    sequences = [torch.tensor(row.tokens, dtype=torch.long) for row in results]
    numbers = {
        "rows": len(call.order),
        "prompt_tokens": call.prompt_tokens,
        "new_tokens": new_tokens,
        "seconds": seconds,
        "tokens_per_second": new_tokens / seconds,
    }
    return GenerateOutput(
        sequences,
        None if call.encoder is None else _texts(call, sequences, results),
        [row.finish for row in results],
        stats | numbers,
        [torch.tensor(row.log_probs) for row in results] if call.options.log_probs else None,
    )


def _texts(call: _Call, sequences: list[torch.Tensor], results: list[Row]) -> list[str]:
    tokenizer, stop = call.encoder.tokenizer, call.options.stop
    texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
    for i, row in enumerate(results):
        if row.finish == "stop":
            # Tidied spaces could hide the string.
            text = tokenizer.decode(row.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            found = [text.find(string) for string in stop if string in text]
            # Only a space that decoding drops in front of the first word can be missing.
            texts[i] = text[: min(found)] if found else ""
    return texts


def _check_rows(
    model, rows: int, options: Options, encoder, adapter_names, streamer, seed, cancel, prefix_cache
) -> None:
    if adapter_names is not None and not hasattr(model, "peft_config"):
        raise InputError("adapter_names: the model carries no adapters; load one, or leave adapter_names out")
    if adapter_names is not None and len(adapter_names) != rows:
        raise InputError(f"adapter_names: expected one name per row ({rows}), got {len(adapter_names)}")
    if streamer is not None and rows != 1:
        raise InputError(f"streamer: it shows one row, got {rows}; generate without it or row by row")
    if streamer is not None and (options.num_return_sequences > 1 or options.num_beams > 1):
        raise InputError("streamer: it shows one result as it grows; leave out num_return_sequences and num_beams")
    if options.stop and encoder is None:
        raise InputError("stop: it needs the processor or tokenizer that turns tokens into text; pass processor=...")
    if cancel is not None and not callable(getattr(cancel, "is_set", None)):
        raise InputError(f"cancel: expected a threading.Event, got {cancel!r}")
    if prefix_cache is not None and not isinstance(prefix_cache, PrefixCache):
        raise InputError(f"prefix_cache: expected a dive_fast.PrefixCache, got {prefix_cache!r}")
    seeds = [] if seed is None else seed if isinstance(seed, list | tuple) else [seed]
    if isinstance(seed, list | tuple) and len(seed) != rows:
        raise InputError(f"seed: expected one number, or one per row ({rows}), got {len(seed)}")
    for one in seeds:
        if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < 2**63:
            raise InputError(f"seed: expected a whole number from 0 to 2**63 - 1, got {one!r}")


def _pad_id(model, encoder: ReportEncoder | None) -> int | None:
    """What left-padded input_ids without an attention_mask are padded with; None where that cannot be told."""
    if encoder is not None:
        pad = encoder.tokenizer.pad_token_id
    else:
        pad = getattr(getattr(unwrapped(model), "generation_config", None), "pad_token_id", None)
    return None if pad in _eos_ids(model, encoder) else pad


def _eos_ids(model, encoder: ReportEncoder | None) -> set[int]:
    """The model's own EOS ids, the tokenizer's, and what reports were trained to end with."""
    configured = getattr(unwrapped(model), "generation_config", None)
    ids = getattr(configured, "eos_token_id", None)
    found = set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    if encoder is not None:
        found |= {encoder.tokenizer.eos_token_id, encoder.end_token_id}
    return found
