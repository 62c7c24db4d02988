"""Several results per prompt: samples and beam search, against transformers and from prompts that run once."""

import itertools

import pytest
import torch

import dive_fast
from dive_fast.decode.native import NativeDecoder, Search
from dive_fast.errors import InputError
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer
from tests.engine_checks import REQUEST, batch_of, mixed_model, steered, whole_logits
from tests.tiny_models import text_batch, tiny_model

PROMPTS = ["Indication: cough.", "Indication: fever and chest pain for three days. Tags: normal.", "Tags: effusion."]


def both(model, inputs, **options):
    """The outputs of the two engines."""
    found = [dive_fast.generate(model, inputs, engine=engine, **options) for engine in ("native", "transformers")]
    assert [out.stats["engine"] for out in found] == ["native", "transformers"]
    return found


def with_eos(model, *tokens):
    model.generation_config.eos_token_id = list(tokens)
    return model


def undecided(*ends):
    """A model with small logits, so that sequences end at many lengths and beams change places often."""
    model = with_eos(tiny_model("llama"), *ends)
    with torch.no_grad():
        model.model.norm.weight.mul_(0.3)
    return model


def assert_same(ours, theirs):
    assert [s.tolist() for s in ours.sequences] == [s.tolist() for s in theirs.sequences]
    assert ours.finish_reasons == theirs.finish_reasons


SEARCHES = [
    {"num_beams": 2},
    {"num_beams": 4, "num_return_sequences": 4},
    {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0},
    {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 2.0},
    {"num_beams": 3, "num_return_sequences": 3, "length_penalty": -1.5},
    {"num_beams": 5, "num_return_sequences": 5, "early_stopping": True},
    {"num_beams": 3, "num_return_sequences": 3, "early_stopping": "never", "length_penalty": 1.3},
    {"num_beams": 4, "num_return_sequences": 2, "min_new_tokens": 7},
    {"num_beams": 4, "num_return_sequences": 2, "min_new_tokens": 5, "early_stopping": True},
]


@pytest.mark.parametrize("options", SEARCHES, ids=str)
@pytest.mark.parametrize("ends", [(), (7,), (7, 11, 30, 44)], ids=str)
def test_beam_search_equals_that_of_transformers(options, ends):
    model = undecided(*ends)
    for length in (1, 2, 25):
        if length >= options.get("min_new_tokens", 0):
            assert_same(*both(model, text_batch(), max_new_tokens=length, **options))


def test_the_searches_above_end_in_all_ways_and_beams_change_places():
    model = undecided(7, 11, 30, 44)
    out = dive_fast.generate(model, text_batch(), max_new_tokens=25, num_beams=4, num_return_sequences=4)
    assert len({len(s) for s in out.sequences}) > 3
    greedy = dive_fast.generate(model, text_batch(), max_new_tokens=25)
    assert any(not torch.equal(a, b) for a, b in zip(out.sequences[::4], greedy.sequences, strict=True))


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "qwen2_5_vl", "smolvlm"])
def test_searches_of_families_and_behind_images(family):
    model = with_eos(tiny_model(family), 9)
    assert_same(*both(model, batch_of(family), max_new_tokens=12, num_beams=3, num_return_sequences=2))


def test_a_search_counts_the_penalty_along_each_beam():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    for prompt in PROMPTS:
        options = {"processor": tokenizer, "max_new_tokens": 20, "num_beams": 4, "repetition_penalty": 1.4}
        assert_same(*both(model, prompt, **options, num_return_sequences=4))


@pytest.mark.parametrize("kind", ["lowrank", "gated"])
@pytest.mark.parametrize("scope", ["response", "all"])
def test_steered_searches(kind, scope):
    model = steered(kind=kind, scope=scope)
    assert_same(*both(model, text_batch(), max_new_tokens=15, num_beams=3, num_return_sequences=3))


def test_searches_with_an_adapter_of_its_own_in_each_row():
    model, batch = mixed_model(), text_batch(4, left_padding=(0, 2, 4, 1))
    names = ["default", "__base__", "vector", "wide"]
    assert_same(*both(model, batch, max_new_tokens=15, num_beams=3, num_return_sequences=2, adapter_names=names))


def test_log_probabilities_of_beams_are_the_models():
    model, batch = with_eos(tiny_model("llama"), 7), text_batch()
    options = {"max_new_tokens": 12, "num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 1.3}
    for out in both(model, batch, log_probs=True, **options):
        for i, (tokens, found) in enumerate(zip(out.sequences, out.log_probs, strict=True)):
            row = {k: v[i // 2 : i // 2 + 1] for k, v in batch.items()}
            exact = whole_logits(model, row, tokens[None]).double().log_softmax(-1)[0]
            assert torch.allclose(found.double(), exact.gather(-1, tokens[:, None])[:, 0], atol=1e-4)


def test_the_best_of_a_search_over_everything_is_found():
    """Eight beams over two steps against all pairs of tokens."""
    model, batch = tiny_model("llama"), text_batch(1)
    out = dive_fast.generate(model, batch, max_new_tokens=2, num_beams=8, num_return_sequences=8, log_probs=True)
    first = whole_logits(model, batch, torch.tensor([[0]])).log_softmax(-1)[0, 0]
    forced = torch.stack([torch.arange(64), torch.zeros(64, dtype=torch.long)], dim=1)
    many = {k: v.expand(64, -1) for k, v in batch.items()}
    second = whole_logits(model, many, forced).log_softmax(-1)[:, 1]
    beams = set(first.topk(8).indices.tolist())
    pairs = sorted(itertools.product(beams, range(64)), key=lambda p: -float(first[p[0]] + second[p[0], p[1]]))
    assert [tuple(s.tolist()) for s in out.sequences] == pairs[:8]
    totals = [float(p.sum()) for p in out.log_probs]
    assert totals == sorted(totals, reverse=True)


def test_a_search_does_not_depend_on_its_company():
    model, batch = with_eos(tiny_model("llama"), 7), text_batch(5, left_padding=(0, 0, 0, 0, 0))
    decoder = NativeDecoder(model)

    def run(order, max_rows, threads):
        rows = (({k: v[[i]] for k, v in batch.items()}, [i], None) for i in order)
        return decoder.run(rows, max_rows=max_rows, threads=threads, sampling=dive_fast.decode.native.Sampling(),
                           eos=[7], min_new_tokens=0, max_new_tokens=20, log_probs=True, samples=2,
                           search=Search(beams=3))  # fmt: skip

    first = run(range(5), 3, 1)
    for order, rows, threads in ([4, 2, 0, 1, 3], 15, 2), ([1, 0, 3, 2, 4], 7, 3):
        assert run(order, rows, threads) == first


def test_beams_share_blocks_and_give_them_back():
    decoder = NativeDecoder(tiny_model("llama"))
    session = decoder.session(4)
    most = []
    batch = text_batch(1, 200)
    decoder.submit(session, batch, None, [REQUEST | {"max_new_tokens": 50, "beams": 4}])
    session.run(on_token=None, cancelled=lambda: most.append(0) and False, until_free=0)
    # Three whole blocks of the prompt are there once; of the one that is written there are at most two for each beam.
    assert session.cache_blocks["held"] == 0 and session.cache_blocks["made"] <= 3 + 2 * 4


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_samples_of_a_row_differ_and_come_row_by_row(engine):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    options = {"processor": tokenizer, "engine": engine, "max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    out = dive_fast.generate(model, PROMPTS, num_return_sequences=4, **options)
    assert len(out.sequences) == len(out.texts) == len(out.finish_reasons) == 12 and out.stats["rows"] == 3
    assert len({tuple(s.tolist()) for s in out.sequences}) == 12
    sharp = options | {"temperature": 1e-3}
    rows = dive_fast.generate(model, PROMPTS, num_return_sequences=3, **sharp).texts
    greedy = dive_fast.generate(model, PROMPTS, processor=tokenizer, max_new_tokens=12).texts
    assert rows == [text for text in greedy for _ in range(3)]


def test_samples_do_not_depend_on_the_batch():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    options = {"processor": tokenizer, "engine": "native", "max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    outs = [
        dive_fast.generate(model, PROMPTS, num_return_sequences=3, batch_size=size, **options).texts
        for size in (1, 2, 3)
    ]
    assert outs[0] == outs[1] == outs[2]


def test_more_samples_than_rows_wait_for_their_turn():
    out = dive_fast.generate(
        tiny_model("llama"), text_batch(1), max_new_tokens=4, temperature=1.0, num_return_sequences=150, engine="native"
    )
    assert [len(s) for s in out.sequences] == [4] * 150
    assert out.stats["steps"] == 12


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 0}, "num_beams: expected a whole number >= 1"),
        ({"num_beams": 9}, "num_beams: expected a whole number from 1 to 8, got 9"),
        ({"num_beams": True}, "num_beams: expected a whole number"),
        ({"num_beams": 2, "temperature": 0.5}, "num_beams: beam search draws nothing, so temperature must be 0"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences: 3 different ones"),
        ({"num_return_sequences": 2}, "num_return_sequences: 2 different ones need a temperature > 0"),
        ({"num_return_sequences": 0}, "num_return_sequences: expected a whole number >= 1"),
        ({"num_beams": 2, "length_penalty": "long"}, "length_penalty: expected a number"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty: expected a finite number"),
        ({"length_penalty": 2.0}, "length_penalty, early_stopping: they shape beam search"),
        ({"early_stopping": True}, "they shape beam search"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping: expected False, True or 'never'"),
        ({"num_beams": 2, "stop": ("x",)}, "stop: beam search knows no stop strings"),
        ({"num_beams": 2, "streamer": object()}, "streamer: it shows one result"),
        ({"num_beams": 2, "top_k": 3}, "give a temperature"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        dive_fast.generate(tiny_llama(), PROMPTS[:1], processor=tiny_tokenizer(), **options)


def test_a_vocabulary_too_small_for_the_beams_is_left_to_transformers():
    model = with_eos(tiny_model("llama"), *range(3, 30))
    with pytest.raises(InputError, match="a vocabulary of 64 tokens is too small for 4 beams"):
        dive_fast.generate(model, text_batch(1), max_new_tokens=2, num_beams=4, engine="native")
