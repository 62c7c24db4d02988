"""How the decoding engine chooses tokens, against exact distributions and transformers."""

import pytest
import torch

import dive_fast
from dive_fast import native
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer
from tests.engine_checks import (
    whole_logits,
)
from tests.tiny_models import (
    text_batch,
    tiny_model,
)


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
