"""Ends that are not tokens: stop strings and cancellation, on both engines."""

import threading
import time

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import dive_fast
from dive_fast.decode.plan import Unsupported
from dive_fast.decode.stop import token_texts
from dive_fast.errors import InputError
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer
from tests.tiny_models import text_batch, tiny_model

PROMPTS = ["Indication: cough.", "Indication: fever and chest pain for three days. Tags: normal.", "Tags: effusion."]
ENGINES = ("native", "transformers")
SPECIALS = ["<unk>", "<s>", "</s>"]


def sentencepiece_tokenizer():
    """Pieces with spaces as "\u2581", and all bytes."""
    pieces = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *(chr(c) for c in range(97, 123))]
    pieces += ["\u2581", "\u2581the", "\u2581lung", "s", "\u2581clear", ".", "\u00e9", "ar", "\u2581ar", "e", ":", "\n"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def wordpiece_tokenizer():
    vocabulary = {piece: i for i, piece in enumerate(["[UNK]", "[SEP]", "lung", "##s", "clear", "abcdef"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]", pad_token="[UNK]")


TOKENIZERS = {"bytes": tiny_tokenizer, "sentencepiece": sentencepiece_tokenizer}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_bytes_of_tokens_join_to_what_the_tokenizer_decodes(name):
    tokenizer = TOKENIZERS[name]()
    tokenizer.add_tokens(["<finding>", "two words"])
    texts = token_texts(tokenizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        ids = torch.randint(0, len(tokenizer), (12,), generator=generator).tolist()
        found = b"".join(texts[i] for i in ids).decode("utf-8", "replace")
        decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if name == "sentencepiece":
            # Its decoder drops the first space and shows every byte of a broken character.
            if "\ufffd" in decoded:
                continue
            found = found.removeprefix(" ") if texts[next(i for i in ids if texts[i])][:1] == b" " else found
        assert found == decoded


def test_added_tokens_and_special_ones():
    tokenizer = tiny_tokenizer()
    assert token_texts(tokenizer)[tokenizer.eos_token_id] == b""
    tokenizer.add_tokens(["<finding>"])
    tokenizer.add_tokens(["<secret>"], special_tokens=True)
    assert token_texts(tokenizer)[-2:] == [b"<finding>", b""]


def test_a_tokenizer_of_another_kind_is_left_to_transformers():
    with pytest.raises(Unsupported, match="its decoder is WordPiece"):
        token_texts(wordpiece_tokenizer())
    options = {"processor": wordpiece_tokenizer(), "max_new_tokens": 3, "stop": ("lungs",)}
    with pytest.raises(InputError, match="'native' cannot run this: stop: it cannot tell"):
        dive_fast.generate(tiny_llama(vocab_size=6), text_prompt(), engine="native", **options)
    out = dive_fast.generate(tiny_llama(vocab_size=6), text_prompt(), **options)
    assert out.stats["engine"] == "transformers" and "stop" in out.stats["not_native"]


def text_prompt():
    return {"input_ids": torch.tensor([[2, 3, 4, 2]])}


def strings_within(texts):
    """Strings to stop at: every few characters of what the model says, of all lengths, some of them never said."""
    for text in texts:
        for start in range(0, len(text) - 8, 5):
            yield from (
                (text[start : start + length],) for length in (1, 3, 8) if "\ufffd" not in text[start : start + 8]
            )
    yield ("never said", texts[0][9:14], texts[1][4:11])
    yield ("never said",)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_rows_end_with_the_token_that_completes_a_stop_string(name):
    tokenizer = TOKENIZERS[name]()
    model = tiny_llama(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 2, "top_k": 40, "engine": "native"}
    prompt = text_batch(2, 9)
    free = dive_fast.generate(model, prompt, processor=tokenizer, **options)
    texts = token_texts(tokenizer)
    for stop in strings_within(free.texts):
        out = dive_fast.generate(model, prompt, processor=tokenizer, stop=stop, **options)
        for row, tokens in enumerate(s.tolist() for s in free.sequences):
            said = [b"".join(texts[t] for t in tokens[: n + 1]) for n in range(len(tokens))]
            end = next((n for n, text in enumerate(said) if any(s.encode() in text for s in stop)), None)
            if end is not None and free.finish_reasons[row] == "length":
                assert out.sequences[row].tolist() == tokens[: end + 1] and out.finish_reasons[row] == "stop"
                assert not any(s in out.texts[row] for s in stop)
                assert free.texts[row].startswith(out.texts[row])
            elif end is None:
                assert out.sequences[row].tolist() == tokens
                assert out.texts[row] == free.texts[row] and out.finish_reasons[row] == free.finish_reasons[row]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_both_engines_stop_at_the_same_token(name):
    tokenizer = TOKENIZERS[name]()
    model = tiny_llama(vocab_size=len(tokenizer))
    options = {"processor": tokenizer, "max_new_tokens": 20, "repetition_penalty": 1.5}
    prompt = text_batch(2, 9, left_padding=(0, 0))
    free = dive_fast.generate(model, prompt, **options).texts
    for stop in list(strings_within(free))[::3]:
        outs = [dive_fast.generate(model, prompt, stop=stop, engine=engine, **options) for engine in ENGINES]
        assert outs[0].finish_reasons == outs[1].finish_reasons
        assert [s.tolist() for s in outs[0].sequences] == [s.tolist() for s in outs[1].sequences]
        assert outs[0].texts == outs[1].texts


@pytest.mark.parametrize("engine", ENGINES)
def test_the_prompt_is_no_part_of_the_text_and_special_tokens_are_none(engine):
    """The prompt ends in "sto", and the model says "pst<|im_start|>arbc"."""
    tokenizer = tiny_tokenizer()
    say = [tokenizer.convert_tokens_to_ids(t) for t in ("p", "s", "t", "<|im_start|>", "a", "r", "b", "c")]
    model = tiny_llama()
    force_tokens(model, tokenizer, say)
    prompt = {"input_ids": torch.tensor([tokenizer("sto", add_special_tokens=False)["input_ids"]])}
    options = {"processor": tokenizer, "engine": engine, "max_new_tokens": 8}
    out = dive_fast.generate(model, prompt, stop=("stop", "star"), **options)
    assert out.sequences[0].tolist() == say[:6] and out.texts == ["p"] and out.finish_reasons == ["stop"]
    for never in ("im_start", "tp", "<|"):
        assert dive_fast.generate(model, prompt, stop=(never,), **options).finish_reasons == ["length"]


def force_tokens(model, tokenizer, say):
    """Make the model say these different tokens whatever the prompt: each one's embedding points at the next."""
    ids = tokenizer("sto", add_special_tokens=False)["input_ids"]
    chain = [ids[-1], *say]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        head = torch.zeros_like(model.lm_head.weight)
        embedding = torch.zeros_like(head)
        size = head.shape[1]
        for place, token in enumerate(chain):
            embedding[token, place % size] = 1.0
            if place:
                head[token, (place - 1) % size] = 1.0
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(head)
        model.model.embed_tokens.weight = torch.nn.Parameter(embedding)
    model.generation_config.eos_token_id = None


@pytest.mark.parametrize("engine", ENGINES)
def test_samples_stop_each_for_itself(engine):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    options = {"processor": tokenizer, "max_new_tokens": 30, "temperature": 1.0, "seed": 1, "engine": engine}
    out = dive_fast.generate(model, PROMPTS[0], num_return_sequences=6, stop=("e", "n"), **options)
    assert len({len(s) for s in out.sequences}) > 1
    assert not any("e" in text or "n" in text for text in out.texts)
    assert {"stop"} <= set(out.finish_reasons) <= {"stop", "eos", "length"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stop": ("",)}, "stop: expected strings that are not empty"),
        ({"stop": [3]}, "stop: expected strings"),
        ({"stop": 3}, "stop: expected strings"),
        ({"cancel": 3}, "cancel: expected a threading.Event"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        dive_fast.generate(tiny_llama(), PROMPTS[:1], processor=tiny_tokenizer(), **options)


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(InputError, match="stop: it needs the processor or tokenizer"):
        dive_fast.generate(tiny_model("llama"), text_batch(1), stop=("x",))


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 2, "early_stopping": "never"}], ids=str
)
@pytest.mark.parametrize("engine", ENGINES)
def test_another_thread_cancels(engine, options):
    model, cancel = tiny_model("llama"), threading.Event()
    model.config.max_position_embeddings = 10**6
    threading.Timer(0.3, cancel.set).start()
    start = time.perf_counter()
    results = options.get("num_return_sequences", 1)
    out = dive_fast.generate(model, text_batch(2), max_new_tokens=900_000, engine=engine, cancel=cancel, **options)
    assert time.perf_counter() - start < 30
    assert out.finish_reasons == ["cancelled"] * 2 * results
    assert all(0 < len(s) < 900_000 for s in out.sequences)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_was_cancelled_before_its_turn_has_nothing(engine):
    cancel = threading.Event()
    cancel.set()
    out = dive_fast.generate(tiny_llama(), PROMPTS, processor=tiny_tokenizer(), engine=engine, cancel=cancel)
    assert out.finish_reasons == ["cancelled"] * 3 and [len(s) for s in out.sequences] == [0] * 3
    assert out.texts == [""] * 3


@pytest.mark.parametrize("engine", ENGINES)
def test_an_event_that_is_never_set_changes_nothing(engine):
    options = {"processor": tiny_tokenizer(), "engine": engine, "max_new_tokens": 8}
    out = dive_fast.generate(tiny_llama(), PROMPTS, cancel=threading.Event(), **options)
    plain = dive_fast.generate(tiny_llama(), PROMPTS, **options)
    assert out.texts == plain.texts and out.finish_reasons == plain.finish_reasons


def steps_of_two_places(lengths):
    """Steps until rows of these lengths are done that take whichever place is free, in their order."""
    places = [0, 0]
    for length in lengths:
        places[places.index(min(places))] += length
    return max(places)


def test_rows_that_end_early_make_room_at_once():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    options = {"processor": tokenizer, "engine": "native", "max_new_tokens": 25, "batch_size": 2}
    prompts = [f"{word} {i}" for i in range(3) for word in ("cough", "fever", "chest")]
    out = dive_fast.generate(model, prompts, stop=("a", "th", "i"), **options)
    lengths = [len(s) for s in out.sequences]
    assert len(set(lengths)) > 3
    assert out.stats["steps"] == steps_of_two_places(lengths)
    assert out.stats["rows_per_step"] == sum(lengths) / out.stats["steps"]


def test_the_batch_stays_full():
    """Six rows of two lengths on two places: the batch stays full, and steps are what the longest places need."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    options = {"processor": tokenizer, "engine": "native", "max_new_tokens": 10, "batch_size": 2}
    out = dive_fast.generate(model, [f"{p} {i}" for i in range(2) for p in PROMPTS], **options)
    assert [len(s) for s in out.sequences] == [10] * 6
    assert out.stats["steps"] == 30 and out.stats["rows_per_step"] == 2.0
