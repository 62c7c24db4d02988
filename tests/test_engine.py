"""The compiled decoding engine against transformers, step by step and token by token."""

import copy
import functools
import itertools

import peft
import pytest
import torch

import dive_fast
from dive_fast import native
from dive_fast.data.films import generated_films
from dive_fast.decode.native import NativeDecoder, Sampling
from dive_fast.decode.plan import Unsupported
from dive_fast.errors import InputError
from dive_fast.models.smol_llava import build_smol_llava
from dive_fast.models.spec import text_config_of
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer
from tests.tiny_models import (
    FAMILIES,
    IMAGE_LENGTH,
    IMAGE_TOKEN,
    VISION_FAMILIES,
    image_inputs,
    randomize_adapters,
    text_batch,
    tiny_model,
)

ROWS = range(3)
KINDS = ("lowrank", "fixed", "gated", "reft")
REQUEST = {
    "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0,
    "eos": [], "min_new_tokens": 0, "log_probs": False,
}  # fmt: skip
"""A greedy request of the extension, without its length."""


def decode(model, batch, steps, *, eos=(), names=None, sampling=None, max_rows=8, **options):
    """The engine's rows for a batch, as lists of tokens in the batch's order."""
    rows = range(batch["input_ids"].shape[0])
    found = NativeDecoder(model, names).run(
        [(batch, rows, names)],
        max_rows=max_rows,
        sampling=sampling or Sampling(),
        eos=eos,
        min_new_tokens=0,
        max_new_tokens=steps,
        **options,
    )
    return [found[row].tokens for row in rows]


def step_logits(model, batch, forced, names=None, weights=None, **options):
    """The engine's logits [B, N, V] when it is made to take the tokens of `forced` [B, N]."""
    decoder = NativeDecoder(model, names, weights)
    rows, steps = forced.shape
    session = decoder.session(rows, **options)
    logits = torch.zeros(rows, steps, decoder.plan.values["vocabulary"])
    requests = [
        REQUEST | {"max_new_tokens": steps, "forced": forced[row].tolist(), "forced_logits": logits[row].data_ptr()}
        for row in range(rows)
    ]
    decoder.submit(session, batch, names, requests)
    session.run(on_token=None, cancelled=None, until_free=0)
    return logits


@torch.no_grad()
def whole_logits(model, batch, forced, names=None):
    """transformers' logits [B, N, V] for the same tokens from one pass over everything, without a cache."""
    length, rows = batch["input_ids"].shape[1], forced.shape[0]
    ids = torch.cat([batch["input_ids"], forced[:, :-1]], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(forced[:, :-1])], dim=1)
    more = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in more:
            more[name] = torch.cat([more[name], torch.zeros_like(forced[:, :-1])], dim=1)
    if hasattr(model, "peft_config"):
        positions = torch.arange(ids.shape[1]).expand(rows, -1) >= length - 1
        more["response_positions"] = positions
        if names is not None:
            more["adapter_names"] = names
    if "image_grid_thw" not in more:
        more["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        if text_config_of(getattr(model, "get_base_model", lambda: model)()).model_type == "qwen2_5_vl_text":
            more["position_ids"] = more["position_ids"].expand(3, -1, -1)
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits[:, length - 1 :]


def assert_greedy(tokens, model, batch, names=None, floor=1e-5):
    """Every token is the likeliest after those before it, up to near ties of the logits of one pass over all."""
    forced = torch.tensor(tokens)
    logits = whole_logits(model, batch, forced, names)
    taken = logits.gather(-1, forced[..., None]).squeeze(-1)
    short = logits.amax(dim=-1) - taken
    assert (short <= floor * logits.abs().amax(dim=-1)).all(), short.max()


def batch_of(family, images=True):
    """Three prompts of unequal length, with an image each where the family sees."""
    batch = text_batch()
    if family not in VISION_FAMILIES or not images:
        return batch
    batch["input_ids"][:, 4 : 4 + IMAGE_LENGTH] = IMAGE_TOKEN
    return batch | image_inputs(family, batch["input_ids"])


def close(ours, theirs, tolerance=1e-4):
    scale = theirs.abs().amax(dim=-1, keepdim=True)
    assert ((ours - theirs).abs() <= tolerance * scale).all(), ((ours - theirs).abs() / scale).max()


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


def steered(family="llama", **config):
    return randomize_adapters(peft.get_peft_model(tiny_model(family), dive_fast.DiveConfig(r=4, **config)).eval())


@pytest.mark.parametrize("site", ["block", "attention"])
@pytest.mark.parametrize("scope", ["response", "prompt", "all"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_steered_logits_equal_those_of_one_uncached_pass(family, kind, scope, site):
    model, batch = steered(family, kind=kind, scope=scope, site=site), batch_of(family)
    forced = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(6))
    ours = step_logits(model, batch, forced)
    close(ours, whole_logits(model, batch, forced))
    with model.disable_adapter():
        base = whole_logits(model, batch, forced)
    assert (ours - base).abs().max() > 1e-3


@pytest.mark.parametrize("activation", ["silu", "identity", "relu", "gelu", "tanh"])
@pytest.mark.parametrize("options", [{}, {"normalize_input": False}, {"preserve_norm": True, "alpha": 0.5}])
def test_every_shape_of_the_push_is_computed(activation, options):
    model, batch = steered(activation=activation, layers_to_transform=[0, 2], **options), text_batch()
    forced = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(7))
    close(step_logits(model, batch, forced), whole_logits(model, batch, forced))


@pytest.mark.parametrize("family", VISION_FAMILIES)
@pytest.mark.parametrize("scope", ["response", "all"])
def test_steering_behind_images(family, scope):
    model, batch = steered(family, scope=scope), batch_of(family)
    tokens = decode(model, batch, 40)
    with torch.no_grad():
        theirs = model.generate(**batch, max_new_tokens=40, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert tokens == theirs.tolist()


@pytest.mark.parametrize("kind", ["lowrank", "gated", "reft"])
@pytest.mark.parametrize("site", ["block", "attention"])
def test_an_untrained_adapter_changes_no_bit(kind, site):
    base, batch = tiny_model("llama"), text_batch()
    forced = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(8))
    before = step_logits(base, batch, forced)
    model = peft.get_peft_model(base, dive_fast.DiveConfig(kind=kind, site=site, r=4)).eval()
    assert torch.equal(step_logits(model, batch, forced), before)


def mixed_model():
    model = steered(kind="lowrank", scope="response")
    model.add_adapter("vector", dive_fast.DiveConfig(kind="fixed", scope="all", site="attention"))
    model.add_adapter("wide", dive_fast.DiveConfig(kind="reft", r=7, scope="response"))
    return randomize_adapters(model)


def test_rows_of_one_batch_carry_different_adapters():
    model, batch = mixed_model(), text_batch(4, left_padding=(0, 2, 4, 1))
    names = ["default", "__base__", "vector", "wide"]
    forced = torch.randint(3, 60, (4, 10), generator=torch.Generator().manual_seed(9))
    ours = step_logits(model, batch, forced, names)
    close(ours, whole_logits(model, batch, forced, names))
    with model.disable_adapter():
        base = step_logits(model, batch, forced)
    assert torch.equal(ours[1], base[1])
    assert all((ours[row] - base[row]).abs().max() > 1e-3 for row in (0, 2, 3))


def test_several_active_adapters_act_in_their_order():
    model, batch = mixed_model(), text_batch()
    model.base_model.set_adapter(["wide", "default"])
    forced = torch.randint(3, 60, (3, 6), generator=torch.Generator().manual_seed(10))
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


def test_min_new_tokens_bars_eos_and_the_penalty_counts_the_prompt():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    options = {"processor": tokenizer, "max_new_tokens": 30, "repetition_penalty": 1.3, "min_new_tokens": 30}
    prompts = ["Indication: cough.", "Tags: effusion."]
    ours = [dive_fast.generate(model, p, engine="native", **options).sequences[0].tolist() for p in prompts]
    theirs = [dive_fast.generate(model, p, engine="transformers", **options).sequences[0].tolist() for p in prompts]
    assert ours == theirs


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_log_probabilities_are_those_of_the_model(engine):
    model, batch = tiny_model("llama"), text_batch()
    options = {"temperature": 0.7, "top_k": 20, "seed": 3, "repetition_penalty": 1.2}
    out = dive_fast.generate(model, batch, max_new_tokens=25, engine=engine, log_probs=True, **options)
    tokens = torch.stack(out.sequences)
    exact = whole_logits(model, batch, tokens).double().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    assert torch.allclose(torch.stack(out.log_probs).double(), exact, atol=1e-4)
    assert dive_fast.generate(model, batch, max_new_tokens=2, engine=engine).log_probs is None


def exact_distribution(logits, temperature, top_k, top_p, min_p):
    """The probabilities that sampling promises, in float64 and by sorting everything."""
    p = (logits.double() / temperature).softmax(-1)
    if top_k:
        p = torch.where(logits >= logits.topk(top_k).values[-1], p, 0.0)
        p = p / p.sum()
    if top_p < 1:
        order = p.argsort(descending=True)
        mass = p[order].cumsum(0)
        p[order[(mass - p[order]) >= top_p]] = 0.0
        p = p / p.sum()
    return torch.where(p >= min_p * p.max(), p, 0.0) / torch.where(p >= min_p * p.max(), p, 0.0).sum()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.5, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_sampling_frequencies_match_the_exact_distribution(options):
    options = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    logits = torch.randn(40, generator=torch.Generator().manual_seed(14)) * 1.5
    draws = 100_000
    tokens = native.load().engine.sample(
        logits=logits.data_ptr(), vocabulary=40, seed=11, stream=3, draws=draws, **options
    )
    counts = torch.bincount(torch.tensor(tokens), minlength=40).double()
    expected = exact_distribution(logits, **options) * draws
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = int(kept.sum()) - 1
    # The 0.999 quantile of chi-square with k degrees of freedom, by Wilson and Hilferty.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_top_p_over_a_large_vocabulary_keeps_what_sorting_everything_keeps():
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(15)) * 0.5
    options = {"temperature": 1.0, "top_k": 0, "top_p": 0.7, "min_p": 0.0}
    tokens = native.load().engine.sample(
        logits=logits.data_ptr(), vocabulary=5000, seed=1, stream=0, draws=20_000, **options
    )
    allowed = exact_distribution(logits, **options) > 0
    assert allowed[torch.tensor(tokens)].all()
    assert len(set(tokens)) > 0.9 * int(allowed.sum())


def test_draws_are_philox_and_uniform():
    """Known answer of Philox4x32-10 for counter and key 0: 0x6627e8d5, 0xe169c58d, ... (Random123's kat_vectors)."""
    uniform = native.load().engine.uniform
    assert uniform(0, 0, 0) == ((0x6627E8D5 << 32 | 0xE169C58D) >> 11) * 2.0**-53
    numbers = torch.tensor([uniform(7, row, step) for row in range(100) for step in range(100)])
    assert 0 <= numbers.min() and numbers.max() < 1
    assert abs(float(numbers.mean()) - 0.5) < 0.01 and abs(float(numbers.var()) - 1 / 12) < 0.002


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


def lora(model):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


def hooked(model):
    model.lm_head.register_forward_hook(lambda *a: None)
    return model


def patched(model):
    model.model.layers[1].mlp.forward = lambda x: x
    return model


def dynamic(model):
    from transformers import LlamaForCausalLM

    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    return LlamaForCausalLM(model.config).eval()


def mixture(model):
    from transformers import MixtralConfig, MixtralForCausalLM

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return MixtralForCausalLM(MixtralConfig(**{n: getattr(model.config, n) for n in names}, num_local_experts=2)).eval()


@pytest.mark.parametrize(
    "change, reason",
    [
        (lora, "another PEFT method"),
        (lambda m: peft.get_peft_model(lora(m).base_model.model, dive_fast.DiveConfig(r=2)), "lora"),
        (hooked, "lm_head has forward hooks"),
        (patched, "the forward of a LlamaMLP was replaced"),
        (dynamic, "rope type 'dynamic'"),
        (mixture, "the family 'mixtral' is unknown"),
        (lambda m: m.double(), "float64"),
        (lambda m: peft.get_peft_model(m, dive_fast.DiveConfig(kind="heads")), "kind 'heads'"),
        (lambda m: m.to("meta"), "meta"),
        (lambda m: torch.ao.quantization.quantize_dynamic(m, {torch.nn.Linear}), "where it expects Linear"),
    ],
)
def test_what_the_engine_cannot_run_is_refused_with_the_reason(change, reason):
    model = change(tiny_model("llama"))
    with pytest.raises(Unsupported, match=reason):
        NativeDecoder(model)
    with pytest.raises(InputError, match=f"engine: 'native' cannot run this: .*({reason})"):
        dive_fast.generate(model, text_batch(1), max_new_tokens=2, engine="native")


def test_hooks_that_transformers_records_by_do_not_count():
    model = tiny_model("llama")
    model(**text_batch(), output_hidden_states=True, output_attentions=False)
    assert any(layer._forward_hooks for layer in model.model.layers)
    NativeDecoder(model)


def test_without_a_named_engine_transformers_takes_over_and_says_why():
    out = dive_fast.generate(tiny_model("llama").double(), text_batch(1), max_new_tokens=2)
    assert out.stats["engine"] == "transformers" and "float64" in out.stats["not_native"]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "holes"),
        ({"position_ids": torch.arange(4)[None]}, "position_ids"),
        ({"inputs_embeds": torch.zeros(1, 4, 32)}, "inputs_embeds"),
    ],
)
def test_inputs_that_the_engine_does_not_know_are_refused(change, reason):
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]])} | change
    with pytest.raises(InputError, match=reason):
        dive_fast.generate(tiny_model("llama"), batch, max_new_tokens=2, engine="native")


def test_a_prompt_of_one_token_and_one_outside_the_vocabulary():
    model = tiny_model("llama")
    ours = decode(model, {"input_ids": torch.tensor([[7]])}, 5)
    with torch.no_grad():
        assert ours == model.generate(torch.tensor([[7]]), max_new_tokens=5, do_sample=False)[:, 1:].tolist()
    with pytest.raises(InputError, match="input_ids holds 64"):
        decode(model, {"input_ids": torch.tensor([[7, 64]])}, 5)


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


def rounded_to_int8(model):
    """The model with every matrix of its decoder and the head as int8 with a scale per row stands for it."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            rows = module.weight.detach().double()
            scales = rows.abs().amax(dim=1, keepdim=True) / 127
            module.weight.data = ((rows / scales).round() * scales).to(module.weight.dtype)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_int8_weights_are_the_rounded_matrices(family):
    model, batch = tiny_model(family), text_batch()
    batch = {k: v[:, -1:] for k, v in batch.items()}  # no prefill, which keeps the model's own matrices
    forced = torch.randint(3, 60, (3, 20), generator=torch.Generator().manual_seed(16))
    ours = step_logits(model, batch, forced, weights="int8")
    close(ours, whole_logits(rounded_to_int8(model), batch, forced))
    assert (ours - step_logits(model, batch, forced)).abs().max() > 1e-4


def test_int8_matrices_are_made_once_and_again_when_the_weights_change():
    model, batch = tiny_model("llama"), text_batch()
    plans = [NativeDecoder(model, weights="int8").plan.values for _ in range(2)]
    addresses = [[layer["down"][0] for layer in plan["layers"]] for plan in plans]
    assert addresses[0] == addresses[1]
    before = dive_fast.generate(model, batch, max_new_tokens=20, weights="int8")
    assert before.stats["engine"] == "native" and before.stats["weights"] == "int8"
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for one, other in zip(model.parameters(), tiny_model("llama", seed=99).parameters(), strict=True):
            one.copy_(other)
    after = dive_fast.generate(model, batch, max_new_tokens=20, weights="int8")
    assert [s.tolist() for s in after.sequences] != [s.tolist() for s in before.sequences]
    again = dive_fast.generate(changed, batch, max_new_tokens=20, weights="int8")
    assert [s.tolist() for s in again.sequences] == [s.tolist() for s in before.sequences]


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"weights": "int4"}, "weights: expected None or 'int8', got 'int4'"),
        ({"weights": "int8", "engine": "transformers"}, "weights: 'int8' needs the native engine"),
    ],
)
def test_weights_that_do_not_exist_are_refused(options, reason):
    with pytest.raises(InputError, match=reason):
        dive_fast.generate(tiny_model("llama"), text_batch(1), max_new_tokens=2, **options)
    with pytest.raises(InputError, match="weights: 'int8' needs the native engine, which cannot run this: .*float64"):
        dive_fast.generate(tiny_model("llama").double(), text_batch(1), max_new_tokens=2, weights="int8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lowrank", "reft"])
def test_steering_of_half_precision_models_stays_nearer_to_float64_than_transformers(kind, dtype):
    def model_of(dtype):
        model = peft.get_peft_model(tiny_model("llama", dtype), dive_fast.DiveConfig(kind=kind, r=4)).eval()
        return randomize_adapters(model)

    model, batch = model_of(dtype), text_batch()
    forced = torch.randint(3, 60, (3, 24), generator=torch.Generator().manual_seed(17))
    ours, theirs = step_logits(model, batch, forced), whole_logits(model, batch, forced).double()
    exact = whole_logits(copy.deepcopy(model).double(), batch, forced)
    assert (ours - exact).abs().mean() <= (theirs - exact).abs().mean()


def test_adapter_numbers_that_float16_cannot_hold_stay_float32():
    for factor in (1e-7, 1e6):
        model = steered(normalize_input=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "dive_down" in name:
                    parameter.mul_(factor)
                elif "dive_up" in name:
                    parameter.div_(factor)
        model = model.to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if "dive_" in name:
                parameter.data = parameter.data.float()
        values = NativeDecoder(model).plan.values["adapters"][0]["block"][0]
        assert (values["down"][1], values["up"][1]) == (0, 0)
