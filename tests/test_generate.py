"""`dive_fast.generate` against transformers' own generate, on text and on films."""

import peft
import pytest
import torch
from transformers import TextIteratorStreamer

import dive_fast
from dive_fast.data.films import generated_films
from dive_fast.data.record import Record
from dive_fast.errors import InputError
from dive_fast.models.smol_llava import build_smol_llava
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer

PROMPTS = ["Indication: cough.", "Indication: fever and chest pain for three days. Tags: normal.", "Tags: effusion."]
EOS = 2
RIGHT_PADDED = {
    "input_ids": torch.tensor([[5, 6, 0], [5, 6, 7]]),
    "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
}


def steered(**config):
    model = peft.get_peft_model(tiny_llama(), dive_fast.DiveConfig(r=4, **config)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dive_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def reference(model, tokenizer, prompt, steps):
    """Greedy decoding by recomputing the whole row at every step."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    length, new = ids.shape[1], []
    for _ in range(steps):
        positions = torch.arange(ids.shape[1])[None] >= length - 1
        token = model(input_ids=ids, response_positions=positions).logits[0, -1].argmax()
        new.append(int(token))
        ids = torch.cat([ids, token.reshape(1, 1)], dim=1)
        if token == EOS:
            break
    return new


def test_greedy_rows_equal_uncached_single_row_decoding():
    model, tokenizer = steered(), tiny_tokenizer()
    out = dive_fast.generate(model, PROMPTS, processor=tokenizer, max_new_tokens=12, batch_size=2)
    assert [s.tolist() for s in out.sequences] == [reference(model, tokenizer, p, 12) for p in PROMPTS]
    assert out.texts == tokenizer.batch_decode(out.sequences, skip_special_tokens=True)
    assert out.stats["engine"] == "native" and out.stats["rows"] == 3
    assert out.stats["new_tokens"] == sum(len(s) for s in out.sequences)


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "<|im_end|>"])
def test_rows_end_at_eos_and_say_so(pad_token):
    """A head that prefers EOS after some tokens, also where the padding token is EOS."""
    model, tokenizer = tiny_llama(), tiny_tokenizer(pad_token=pad_token)
    seen = {}

    def push_eos(module, args, output):
        step = seen["step"] = seen.get("step", -1) + 1
        output[:, -1, EOS] = torch.tensor([100.0 if step == 2 + 3 * row else -100.0 for row in range(len(output))])
        return output

    handle = model.lm_head.register_forward_hook(push_eos)
    out = dive_fast.generate(model, PROMPTS[:2], processor=tokenizer, max_new_tokens=5)
    handle.remove()
    assert sorted(len(s) for s in out.sequences) == [3, 5]
    ended = [len(s) == 3 for s in out.sequences]
    assert [r == "eos" for r in out.finish_reasons] == ended
    assert all((int(s[-1]) == EOS) == e and EOS not in s[:-1] for s, e in zip(out.sequences, ended, strict=True))


def test_an_encoded_batch_gives_the_same_rows_as_prompts():
    model, tokenizer = steered(), tiny_tokenizer()
    from dive_fast.data.encoding import ReportEncoder

    batch = ReportEncoder(tokenizer).prompts([Record("a", p, "") for p in PROMPTS])
    out = dive_fast.generate(model, batch, max_new_tokens=8)
    again = dive_fast.generate(model, PROMPTS, processor=tokenizer, max_new_tokens=8)
    assert out.texts is None
    assert all(torch.equal(a, b) for a, b in zip(out.sequences, again.sequences, strict=True))


def test_sampling_repeats_with_a_seed():
    model, tokenizer = steered(), tiny_tokenizer()
    options = {"processor": tokenizer, "max_new_tokens": 12, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
    first, again, other = (dive_fast.generate(model, PROMPTS, seed=s, **options).texts for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_a_row_with_a_seed_of_its_own_draws_the_same_wherever_it_stands(engine):
    options = {"processor": tiny_tokenizer(), "max_new_tokens": 12, "temperature": 1.0, "engine": engine}
    model, rows = steered(), list(zip(PROMPTS * 2, (5, 6, 7, 8, 5, 7), strict=True))

    def texts(rows, **more):
        prompts, seeds = zip(*rows, strict=True)
        return dive_fast.generate(model, prompts, seed=seeds, **options, **more).texts

    # transformers has one generator for all rows of a batch, so there a batch is one row.
    size = {"native": 8, "transformers": 1}[engine]
    together = texts(rows, batch_size=size)
    assert [texts([row])[0] for row in rows] == together
    assert texts(rows[::-1], batch_size=size) == together[::-1]
    assert together[0] != together[3], "another seed, the same prompt"
    sampled = texts(rows[:2], batch_size=size, num_return_sequences=2)
    assert sampled[2:] == texts(rows[1:2], num_return_sequences=2) and sampled[0] != sampled[1]


def test_min_new_tokens_and_repetition_penalty_reach_the_decoder():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    handle = model.lm_head.register_forward_hook(lambda m, a, o: o.index_fill(-1, torch.tensor([EOS]), 1e3))
    assert [len(s) for s in dive_fast.generate(model, PROMPTS, processor=tokenizer, max_new_tokens=9).sequences] == [
        1
    ] * 3
    out = dive_fast.generate(model, PROMPTS, processor=tokenizer, max_new_tokens=9, min_new_tokens=4)
    assert [len(s) for s in out.sequences] == [5] * 3
    handle.remove()
    plain = dive_fast.generate(model, PROMPTS, processor=tokenizer, max_new_tokens=30)
    varied = dive_fast.generate(model, PROMPTS, processor=tokenizer, max_new_tokens=30, repetition_penalty=5.0)
    assert len(set(varied.sequences[0].tolist())) > len(set(plain.sequences[0].tolist()))


def test_adapter_names_follow_the_rows_through_batching():
    model, tokenizer = steered(), tiny_tokenizer()
    alone = dive_fast.generate(model, PROMPTS, processor=tokenizer, max_new_tokens=8).texts
    with model.disable_adapter():
        base = dive_fast.generate(model, PROMPTS, processor=tokenizer, max_new_tokens=8).texts
    mixed = dive_fast.generate(
        model,
        PROMPTS,
        processor=tokenizer,
        max_new_tokens=8,
        adapter_names=["__base__", "default", "__base__"],
        batch_size=2,
    )
    assert mixed.texts == [base[0], alone[1], base[2]]


def test_streaming_shows_the_text_that_is_returned():
    model, tokenizer = steered(), tiny_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    out = dive_fast.generate(model, PROMPTS[0], processor=tokenizer, max_new_tokens=12, streamer=streamer)
    assert "".join(streamer) == out.texts[0]


def test_generation_runs_on_films_and_keeps_the_rows_apart():
    model, processor = build_smol_llava()
    model = peft.get_peft_model(model, dive_fast.DiveConfig(r=4)).eval()
    films = generated_films(3, seed=1)
    out = dive_fast.generate(model, films, processor=processor, max_new_tokens=6, batch_size=2)
    swapped = [Record(f.id, f.prompt, f.report, g.images) for f, g in zip(films, reversed(films), strict=True)]
    other = dive_fast.generate(model, swapped, processor=processor, max_new_tokens=6, batch_size=2)
    assert torch.equal(out.sequences[1], other.sequences[1])
    assert len(out.texts) == 3


@pytest.mark.parametrize(
    "inputs, options, message",
    [
        ([], {}, "inputs: nothing"),
        ([" "], {}, "prompt 0 is empty"),
        ([3], {}, "item 0 is a int"),
        ([Record("r7", "  ", "")], {}, "prompt of record 'r7' is empty"),
        (PROMPTS, {"seed": -1}, "seed: expected a whole number from 0"),
        (PROMPTS, {"seed": 10**30}, "seed: expected a whole number from 0"),
        (PROMPTS, {"seed": [1, 2]}, r"seed: expected one number, or one per row \(3\), got 2"),
        (PROMPTS, {"seed": [1, 2, -3]}, "seed: expected a whole number from 0"),
        (PROMPTS, {"seed": "123"}, "seed: expected a whole number from 0"),
        (PROMPTS, {"adapter_names": ["default", "nobody", "__base__"]}, "no adapter 'nobody'; there are"),
        ({"attention_mask": 1}, {}, "needs input_ids"),
        ({"input_ids": [[3, 4]]}, {}, "input_ids as a tensor .* got list; encode with return_tensors='pt'"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, {}, r"got \[0, 4\]"),
        (PROMPTS, {"engine": "fast"}, "engine: expected None or 'native', 'transformers', got 'fast'"),
        (PROMPTS, {"min_p": 2, "temperature": 1.0}, "min_p: expected a number in"),
        (PROMPTS, {"max_new_tokens": 0}, "max_new_tokens: expected a whole number >= 1"),
        (PROMPTS, {"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens: 9 is more"),
        (PROMPTS, {"temperature": -1}, "temperature"),
        (PROMPTS, {"top_p": 1.5, "temperature": 1.0}, "top_p"),
        (PROMPTS, {"top_k": 5}, "give a temperature"),
        (PROMPTS, {"temperature": "hot"}, "temperature: expected a number, got 'hot'"),
        (RIGHT_PADDED, {}, "ends in padding; encode with padding_side='left'"),
        (PROMPTS, {"repetition_penalty": 0}, "repetition_penalty"),
        (PROMPTS, {"batch_size": 0}, "batch_size"),
        (PROMPTS, {"adapter_names": ["default"]}, "one name per row"),
        (PROMPTS, {"streamer": object()}, "one row"),
        (["word " * 3000], {}, "fills the model's context"),
        (["word " * 15], {"max_new_tokens": 2040}, "lower max_new_tokens"),
        ([generated_films(1)[0]], {}, "has images"),
    ],
)
def test_bad_input_is_refused_by_name(inputs, options, message):
    with pytest.raises(InputError, match=message):
        dive_fast.generate(steered(), inputs, processor=tiny_tokenizer(), **options)


@pytest.mark.parametrize("model", ["smollm2", None, 5])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(InputError, match=f"model: expected a transformers .* got {type(model).__name__}; .*load"):
        dive_fast.generate(model, ["a prompt"], processor=tiny_tokenizer())


def test_prompts_without_a_processor_are_refused():
    with pytest.raises(InputError, match="processor:"):
        dive_fast.generate(steered(), PROMPTS)


def test_adapter_names_need_a_model_with_adapters():
    with pytest.raises(InputError, match="adapter_names: the model carries no adapters"):
        dive_fast.generate(tiny_llama(), PROMPTS, processor=tiny_tokenizer(), adapter_names=["__base__"] * 3)


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_padding_without_a_mask_is_no_text(engine):
    model, tokenizer = steered(), tiny_tokenizer()
    batch = tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="pt")
    options = {"processor": tokenizer, "max_new_tokens": 6, "engine": engine}
    expected = dive_fast.generate(model, dict(batch), **options).texts
    assert dive_fast.generate(model, {"input_ids": batch["input_ids"]}, **options).texts == expected
    as_float = dict(batch) | {"attention_mask": batch["attention_mask"].float()}
    assert dive_fast.generate(model, as_float, **options).texts == expected


def test_a_prompt_that_is_too_long_is_refused_before_another_is_run(monkeypatch):
    from dive_fast.decode.prefill import Prefill

    ran = []
    monkeypatch.setattr(Prefill, "run", lambda *args: ran.append(args))
    limit = tiny_llama().config.max_position_embeddings
    records = [Record(f"case {i}", prompt, "") for i, prompt in enumerate([*PROMPTS, "cough " * (limit - 15)])]
    with pytest.raises(InputError, match=r"max_new_tokens: a prompt of \d+ tokens \(case 3\) leaves \d of the model's"):
        dive_fast.generate(tiny_llama(), records, processor=tiny_tokenizer(), max_new_tokens=4)
    assert not ran


def test_every_module_is_given_back_in_its_mode():
    model = tiny_llama().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    dive_fast.generate(model, PROMPTS, processor=tiny_tokenizer(), max_new_tokens=2)
    assert [module.training for module in model.modules()] == modes


def test_the_engines_seed_is_its_own():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    dive_fast.generate(
        tiny_llama(), PROMPTS, processor=tiny_tokenizer(), max_new_tokens=2, temperature=1.0, seed=1, engine="native"
    )
    assert torch.equal(torch.rand(1), expected)
