"""The compiled decoding engine against transformers, step by step and token by token."""

import functools
import itertools

import peft
import pytest
import torch

import dive_fast
from dive_fast import native
from dive_fast.data.films import generated_films
from dive_fast.decode.native import NativeDecoder, Sampling
from dive_fast.models.smol_llava import build_smol_llava
from dive_fast.models.spec import text_config_of
from tests.engine_checks import (
    REQUEST,
    ROWS,
    assert_greedy,
    batch_of,
    close,
    decode,
    mixed_model,
    steered,
    step_logits,
    whole_logits,
)
from tests.tiny_models import (
    FAMILIES,
    text_batch,
    tiny_model,
)


@functools.cache
def long_model(family):
    model = tiny_model(family)
    text_config_of(model).max_position_embeddings = 512
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_equal_transformers_for_200_tokens(family):
    model, batch = long_model(family), batch_of(family)
    tokens = decode(model, batch, 200)
    assert_greedy(tokens, model, batch)
    close(step_logits(model, batch, torch.tensor(tokens)), whole_logits(model, batch, torch.tensor(tokens)))
    with torch.no_grad():
        theirs = model.generate(**batch, max_new_tokens=200, do_sample=False)[:, batch["input_ids"].shape[1] :]
    # Behind a near tie two right answers differ, so only what both took is compared; the check above covers the rest.
    same = [len(list(itertools.takewhile(lambda p: p[0] == p[1], zip(a, b.tolist(), strict=True))))
            for a, b in zip(tokens, theirs, strict=True)]  # fmt: skip
    assert sum(same) == 600 or max(same) == 200, same


FEATURES = {
    "rope llama3": lambda: tiny_config("llama", rope_parameters={
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}),
    "rope linear": lambda: tiny_config("llama", rope_parameters={
        "rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "rope yarn": lambda: tiny_config("qwen2", rope_parameters={
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}),
    "attention bias": lambda: tiny_config("llama", attention_bias=True),
    "head size of its own": lambda: tiny_config("llama", head_dim=16),
    "one key/value head": lambda: tiny_config("llama", num_key_value_heads=1),
    "gelu": lambda: tiny_config("llama", hidden_act="gelu"),
    "untied": lambda: tiny_config("llama", tie_word_embeddings=False),
    "window in some layers": lambda: tiny_config("qwen3", use_sliding_window=True, sliding_window=5,
                                                 max_window_layers=1),
    "logit softcap": lambda: tiny_config("gemma3", final_logit_softcapping=2.0),
    "query scale": lambda: tiny_config("gemma3", query_pre_attn_scalar=16),
}  # fmt: skip


def tiny_config(family, **changes):
    """A model of the family with some of its configuration changed; biases and norms random too."""
    from transformers import AutoModelForCausalLM

    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    if "max_window_layers" in changes:
        config.layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.copy_(spread if parameter.dim() > 1 else parameter + spread)
    return model.eval()


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_of_a_family_is_computed(feature):
    model, batch = FEATURES[feature](), text_batch()
    forced = torch.randint(3, 60, (3, 40), generator=torch.Generator().manual_seed(5))
    close(step_logits(model, batch, forced), whole_logits(model, batch, forced))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_half_precision_weights_stay_nearer_to_float64_than_transformers(family, dtype):
    model, batch = tiny_model(family, dtype), text_batch()
    forced = torch.randint(3, 60, (3, 24), generator=torch.Generator().manual_seed(11))
    ours, theirs = step_logits(model, batch, forced), whole_logits(model, batch, forced).double()
    exact = whole_logits(tiny_model(family, dtype).double(), batch, forced)
    assert (ours - exact).abs().mean() <= (theirs - exact).abs().mean()
    assert (ours - exact).abs().max() <= (theirs - exact).abs().max() + 1e-6


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.2, seed=5)]
)
def test_a_row_depends_on_nothing_but_itself(sampling):
    """Bit for bit: alone, in other company, in other order, in turns on fewer rows, on other thread counts."""
    model, batch = mixed_model(), text_batch(4, left_padding=(0, 0, 0, 0))
    names = ["default", "vector", "__base__", "wide"]
    decoder = NativeDecoder(model, names)

    def run(order, max_rows, threads, one_by_one=False):
        parts = [[row] for row in order] if one_by_one else [order]
        batches = (({k: v[part] for k, v in batch.items()}, part, [names[row] for row in part]) for part in parts)
        return decoder.run(batches, max_rows=max_rows, threads=threads, sampling=sampling, eos=[5], min_new_tokens=2,
                           max_new_tokens=30, log_probs=True)  # fmt: skip

    # Prompts run by themselves everywhere, so that the prefill, which is torch's, is the same.
    first = run([0, 1, 2, 3], 4, 1, one_by_one=True)
    for order, rows, threads in ([3, 1, 0, 2], 4, 2), ([2, 0, 3, 1], 2, 1), ([0, 1, 2, 3], 1, 2), ([1, 3, 2, 0], 3, 3):
        assert run(order, rows, threads, one_by_one=True) == first, (order, rows, threads)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_logits_are_bit_equal_for_every_thread_count(threads):
    model, batch = steered(kind="lowrank"), text_batch()
    forced = torch.randint(3, 60, (3, 20), generator=torch.Generator().manual_seed(12))
    assert torch.equal(step_logits(model, batch, forced, threads=threads),
                       step_logits(model, batch, forced, threads=1))  # fmt: skip


@pytest.mark.parametrize("isa", native.load().cpu.kernel_levels())
def test_every_instruction_set_level_is_right(isa):
    model, batch = steered("qwen2", kind="lowrank"), text_batch()
    forced = torch.randint(3, 60, (3, 20), generator=torch.Generator().manual_seed(13))
    close(step_logits(model, batch, forced, isa=isa), whole_logits(model, batch, forced))


def test_rows_end_exactly_at_eos_and_others_take_their_place():
    model, batch = tiny_model("llama"), text_batch(5, left_padding=(0, 2, 4, 0, 1))
    free = decode(model, batch, 40)
    eos = free[0][7], free[2][3]
    ended = decode(model, batch, 40, eos=eos, max_rows=2)
    for row, tokens in enumerate(free):
        end = next((i for i, token in enumerate(tokens) if token in eos), 39)
        assert ended[row] == tokens[: end + 1]


def test_a_finished_row_costs_nothing():
    model, batch = tiny_model("llama"), text_batch(2, left_padding=(0, 0))
    decoder = NativeDecoder(model)
    session = decoder.session(2)
    decoder.submit(session, batch, None, [REQUEST | {"max_new_tokens": n} for n in (3, 20)])
    session.run(on_token=None, cancelled=None, until_free=0)
    assert (session.steps, session.rows_run) == (20, 23)


def test_streamed_tokens_come_in_order_and_an_error_in_the_callback_ends_the_run():
    model, batch = tiny_model("llama"), text_batch()
    seen = {row: [] for row in ROWS}
    tokens = decode(model, batch, 12, on_token=lambda row, token: seen[row].append(token))
    assert [seen[row] for row in ROWS] == tokens

    def fail(row, token):
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        decode(model, batch, 12, on_token=fail)


def test_another_thread_can_cancel():
    import threading

    decoder = NativeDecoder(tiny_model("llama"))
    session = decoder.session(1)
    decoder.submit(session, text_batch(1), None, [REQUEST | {"max_new_tokens": 1_000_000}])
    timer = threading.Timer(0.2, session.cancel)
    timer.start()
    session.run(on_token=None, cancelled=None, until_free=0)
    tokens, _, finish = session.take(0)
    assert finish == "cancelled" and 0 < len(tokens) < 1_000_000


def test_films_go_through_the_engine():
    model, processor = build_smol_llava()
    model = peft.get_peft_model(model, dive_fast.DiveConfig(r=4)).eval()
    films = generated_films(3, seed=1)
    outs = [
        dive_fast.generate(model, films, processor=processor, max_new_tokens=12, batch_size=2, engine=engine)
        for engine in ("native", "transformers")
    ]
    assert [s.tolist() for s in outs[0].sequences] == [s.tolist() for s in outs[1].sequences]
    assert [out.stats["engine"] for out in outs] == ["native", "transformers"]


@pytest.fixture(scope="module")
def smollm2():
    from dive_fast.models.backbone import load_backbone

    return load_backbone("smollm2", dtype=torch.float32)


def test_real_prompts_on_smollm2_give_the_tokens_of_transformers(smollm2):
    model, tokenizer = smollm2
    prompts = [
        "Indication: cough and fever for two weeks. Describe the findings of the chest X-ray.",
        "What is a lung?",
    ]
    outs = [
        dive_fast.generate(model, prompts, processor=tokenizer, max_new_tokens=60, engine=engine)
        for engine in ("native", "transformers")
    ]
    assert outs[0].texts == outs[1].texts
    assert outs[0].finish_reasons == outs[1].finish_reasons


def test_options_on_smollm2_are_those_of_transformers(smollm2):
    model, tokenizer = smollm2
    prompts = ["Describe the findings of the chest X-ray: cough.", "What is a lung? Name its parts."]
    options = {"processor": tokenizer, "max_new_tokens": 12}
    plain = dive_fast.generate(model, prompts, **options)
    for more in (
        {"num_beams": 3, "num_return_sequences": 2},
        {"stop": (plain.texts[0][10:17], plain.texts[1][15:20])},
        {"stop": ("\u00e9", ". The")},
    ):
        outs = [
            dive_fast.generate(model, prompts, engine=engine, **options, **more)
            for engine in ("native", "transformers")
        ]
        assert outs[0].texts == outs[1].texts
        assert outs[0].finish_reasons == outs[1].finish_reasons
    cache = dive_fast.PrefixCache(2**28)
    for _ in range(2):
        assert dive_fast.generate(model, prompts, prefix_cache=cache, **options).texts == plain.texts
