"""The decoding engine on a GPU: against transformers on the CPU in float32, in half precision against float64.

The kernels alone run without a GPU as well, in csrc/tests (`make sanitize`).
"""

import copy
import threading

import pytest
import torch

import dive_fast
from dive_fast import native
from dive_fast.decode import native as engine
from dive_fast.decode.native import NativeDecoder, Sampling
from dive_fast.decode.plan import Unsupported
from dive_fast.errors import InputError
from tests.engine_checks import (
    KINDS,
    REQUEST,
    assert_greedy,
    batch_of,
    close,
    decode,
    mixed_model,
    steered,
    step_logits,
    whole_logits,
)
from tests.tiny_models import FAMILIES, text_batch, tiny_model

gpu = pytest.mark.gpu


def on_gpu(model):
    return copy.deepcopy(model).to("cuda")


def random_tokens(rows, steps, seed=0):
    return torch.randint(3, 60, (rows, steps), generator=torch.Generator().manual_seed(seed))


# -- without a GPU ---------------------------------------------------------------------------------------------------


class FakeExtension:
    """What `_check_cuda` asks of the extension."""

    def __init__(self, built=True, refusal=""):
        self.cuda = type("cuda", (), {"built": staticmethod(lambda: built)})
        self.engine = type("engine", (), {"refusal_of_cuda": staticmethod(lambda plan: refusal)})


@pytest.mark.parametrize(
    "extension, covered, reason",
    [
        (FakeExtension(built=False), None, "built without CUDA"),
        (FakeExtension(), "no kernel image is available", "cuda:0: no kernel image is available; `dive-fast doctor`"),
        (FakeExtension(refusal="layer 0: q_proj is int8"), None, "cannot run this decoder: layer 0: q_proj is int8"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_named_with_the_reason(monkeypatch, extension, covered, reason):
    monkeypatch.setattr(engine, "_covered", lambda index: covered)
    with pytest.raises(Unsupported, match=reason):
        engine._check_cuda(extension, torch.device("cuda", 0), None)
    engine._check_cuda(FakeExtension(), torch.device("cuda", 0), None) if covered is None else None


def test_too_little_memory_is_asked_for_once_more_and_then_reported(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    calls = []

    def call(enough_after):
        calls.append(True)
        if len(calls) <= enough_after:
            raise RuntimeError("CUDA: out of memory: 5 MiB for logits, and 1 MiB of 9 MiB are free")
        return "done"

    assert engine._with_memory(call, enough_after=1) == "done" and emptied == [True]
    calls.clear()
    with pytest.raises(torch.OutOfMemoryError, match="5 MiB for logits"):
        engine._with_memory(call, enough_after=2)
    with pytest.raises(RuntimeError, match="another"):
        engine._with_memory(lambda: (_ for _ in ()).throw(RuntimeError("another")))


def test_the_extension_refuses_what_kernels_cannot_read():
    if not native.load().cuda.built():
        pytest.skip("the extension was built without CUDA")
    refusal = native.load().engine.refusal_of_cuda
    assert refusal(NativeDecoder(tiny_model("llama")).compiled) == ""
    assert "int8" in refusal(NativeDecoder(tiny_model("llama"), weights="int8").compiled)
    mixed = tiny_model("llama")
    mixed.model.layers[1].mlp.to(torch.bfloat16)
    assert "layer 1: gate_proj has another dtype" in refusal(NativeDecoder(mixed).compiled)


# -- with one --------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("chosen", [None, "native"])
def test_8_bit_weights_are_refused(chosen):
    with pytest.raises(InputError, match="8-bit weights are for decoders on the CPU"):
        dive_fast.generate(on_gpu(tiny_model("llama")), text_batch(1), max_new_tokens=2, weights="int8", engine=chosen)


@gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_at_every_step(family):
    model, batch = tiny_model(family), batch_of(family)
    forced = random_tokens(3, 40)
    close(step_logits(on_gpu(model), batch, forced), whole_logits(model, batch, forced))


@gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_likeliest_ones(family):
    # The device's own loop, past the end of a block of the cache.
    model, batch = tiny_model(family), batch_of(family, images=False)
    assert_greedy(decode(on_gpu(model), batch, 100), model, batch)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_half_precision_is_as_near_to_float64_as_transformers(family, dtype):
    model, batch = tiny_model(family, dtype), text_batch()
    forced = random_tokens(3, 24, seed=11)
    there = on_gpu(model)
    ours = step_logits(there, batch, forced)
    on_device = {name: value.to("cuda") for name, value in batch.items()}
    theirs = whole_logits(there, on_device, forced.to("cuda")).double().cpu()
    exact = whole_logits(tiny_model(family, dtype).double(), batch, forced)
    # Activations are rounded where they enter a product here, and behind every operation there.
    assert (ours - exact).abs().mean() <= (theirs - exact).abs().mean()


@gpu
@pytest.mark.parametrize("site", ["block", "attention"])
@pytest.mark.parametrize("scope", ["response", "prompt", "all"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_steered_logits_equal_those_of_one_uncached_pass(family, kind, scope, site):
    model, batch = steered(family, kind=kind, scope=scope, site=site), batch_of(family)
    forced = random_tokens(3, 12, seed=6)
    ours = step_logits(on_gpu(model), batch, forced)
    close(ours, whole_logits(model, batch, forced))
    with model.disable_adapter():
        base = whole_logits(model, batch, forced)
    assert (ours - base).abs().max() > 1e-3


@gpu
@pytest.mark.parametrize("activation", ["silu", "identity", "relu", "gelu", "tanh"])
@pytest.mark.parametrize("options", [{}, {"normalize_input": False}, {"preserve_norm": True, "alpha": 0.5}])
def test_every_shape_of_the_push_is_computed(activation, options):
    model, batch = steered(activation=activation, layers_to_transform=[0, 2], **options), text_batch()
    forced = random_tokens(3, 8, seed=7)
    close(step_logits(on_gpu(model), batch, forced), whole_logits(model, batch, forced))


@gpu
def test_rows_of_one_batch_carry_different_adapters():
    model, batch = mixed_model(), text_batch(4, left_padding=(0, 2, 4, 1))
    names = ["default", "__base__", "vector", "wide"]
    forced = random_tokens(4, 10, seed=9)
    there = on_gpu(model)
    ours = step_logits(there, batch, forced, names)
    close(ours, whole_logits(model, batch, forced, names))
    with there.disable_adapter():
        base = step_logits(there, batch, forced)
    assert torch.equal(ours[1], base[1])


@gpu
def test_several_active_adapters_act_in_their_order():
    model, batch = mixed_model(), text_batch()
    model.base_model.set_adapter(["wide", "default"])
    forced = random_tokens(3, 6, seed=10)
    close(step_logits(on_gpu(model), batch, forced), whole_logits(model, batch, forced))


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.2, seed=5),
    Sampling(temperature=1.3, top_k=9, min_p=0.02, seed=8),
]


@gpu
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_row_depends_on_nothing_but_itself(sampling):
    model, batch = on_gpu(mixed_model()), text_batch(4, left_padding=(0, 0, 0, 0))
    names = ["default", "vector", "__base__", "wide"]
    decoder = NativeDecoder(model, names)

    def run(order, max_rows):
        batches = (({k: v[[row]] for k, v in batch.items()}, [row], [names[row]]) for row in order)
        return decoder.run(batches, max_rows=max_rows, sampling=sampling, eos=[5], min_new_tokens=2,
                           max_new_tokens=30, log_probs=True)  # fmt: skip

    first = run([0, 1, 2, 3], 4)
    for order, rows in ([3, 1, 0, 2], 4), ([2, 0, 3, 1], 2), ([0, 1, 2, 3], 1):
        assert run(order, rows) == first, (order, rows)


@gpu
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_devices_sampler_draws_what_the_hosts_does(sampling):
    # Stop strings are looked for on the host, so rows with some take its sampler: here one that never comes.
    model, batch = on_gpu(tiny_model("llama")), text_batch()
    decoder = NativeDecoder(model)
    never = native.load().engine.StopStrings(native.load().engine.TokenTexts([b"a"] * 64), ["b"])
    options = {"max_rows": 3, "sampling": sampling, "eos": [5], "min_new_tokens": 3, "max_new_tokens": 60}
    there, here = (decoder.run([(batch, range(3), None)], stop=stop, **options) for stop in (None, never))
    assert there == here


@gpu
def test_samples_have_the_frequencies_of_the_models_probabilities():
    model, batch = tiny_model("llama"), text_batch(1, left_padding=(0,))
    draws = 4096
    out = dive_fast.generate(on_gpu(model), batch, engine="native", max_new_tokens=1, temperature=1.0, seed=3,
                             num_return_sequences=draws)  # fmt: skip
    counts = torch.bincount(torch.cat(out.sequences), minlength=64).double()
    p = whole_logits(model, batch, torch.zeros(1, 1, dtype=torch.long))[0, 0].double().softmax(-1)
    statistic = ((counts - p * draws) ** 2 / (p * draws)).sum()
    assert statistic < 63 * (1 - 2 / (9 * 63) + 3.09 * (2 / (9 * 63)) ** 0.5) ** 3


@gpu
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 13, 24, 33, 64])
def test_every_batch_size_gives_the_rows_own_tokens(rows):
    model = on_gpu(tiny_model("qwen2"))
    batch = text_batch(rows, left_padding=[row % 5 for row in range(rows)])
    together = decode(model, batch, 12, max_rows=64)
    for row in {0, rows // 2, rows - 1}:
        alone = {name: value[[row]] for name, value in batch.items()}
        assert decode(model, alone, 12) == [together[row]]


@gpu
def test_rows_end_exactly_at_eos_and_cost_nothing_afterwards():
    model, batch = on_gpu(tiny_model("llama")), text_batch(5, left_padding=(0, 2, 4, 0, 1))
    free = decode(model, batch, 40)
    eos = free[0][7], free[2][3]
    decoder = NativeDecoder(model)
    found = decoder.run([(batch, range(5), None)], max_rows=2, sampling=Sampling(), eos=eos, min_new_tokens=0,
                        max_new_tokens=40)  # fmt: skip
    for row, tokens in enumerate(free):
        end = next((i for i, token in enumerate(tokens) if token in eos), 39)
        assert found[row].tokens == tokens[: end + 1]
    session = decoder.session(2)
    decoder.submit(
        session, text_batch(2, left_padding=(0, 0)), None, [REQUEST | {"max_new_tokens": n} for n in (3, 20)]
    )
    session.run(on_token=None, cancelled=None, until_free=0)
    assert (session.steps, session.rows_run) == (20, 23)


@gpu
def test_the_host_does_nothing_for_a_token():
    from torch.profiler import ProfilerActivity, profile

    decoder = NativeDecoder(on_gpu(tiny_model("llama")))
    session = decoder.session(1)
    for steps in (80, 80):
        decoder.submit(session, text_batch(1, left_padding=(0,)), None, [REQUEST | {"max_new_tokens": steps}])
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            session.run(on_token=None, cancelled=None, until_free=0)
    names = [event.name for event in trace.events()]
    started = [name for name in names if "Launch" in name]
    copies = [name for name in names if "cudaMemcpy" in name]
    # 80 tokens in one loop: one start, and a copy each of what the rows are and how they go on.
    assert len(started) <= 2 and len(copies) <= 8, (started, copies)


@gpu
def test_tokens_are_streamed_and_a_run_can_be_cancelled():
    model, batch = on_gpu(tiny_model("llama")), text_batch()
    seen = {row: [] for row in range(3)}
    tokens = decode(model, batch, 12, on_token=lambda row, token: seen[row].append(token))
    assert [seen[row] for row in range(3)] == tokens

    def fail(row, token):
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        decode(model, batch, 12, on_token=fail)
    decoder = NativeDecoder(model)
    session = decoder.session(1)
    one = text_batch(1, left_padding=(0,))
    decoder.submit(session, one, None, [REQUEST | {"max_new_tokens": 1_000_000}])
    threading.Timer(0.2, session.cancel).start()
    session.run(on_token=None, cancelled=None, until_free=0)
    tokens, _, finish = session.take(0)
    assert finish == "cancelled" and 0 < len(tokens) < 1_000_000


@gpu
def test_generate_takes_beams_stop_strings_prefixes_and_films_on_the_gpu():
    from dive_fast.data.films import generated_films
    from dive_fast.models.smol_llava import build_smol_llava

    model, processor = build_smol_llava()
    films = generated_films(3, seed=1)
    there = on_gpu(model)
    plain = dive_fast.generate(model, films, processor=processor, max_new_tokens=24)
    for options in (
        {},
        {"prefix_cache": dive_fast.PrefixCache(2**28)},
        {"stop": (plain.texts[0][5:9],)},
        {"num_beams": 3},
    ):
        on_cpu = dive_fast.generate(model, films, processor=processor, max_new_tokens=24, engine="native", **options)
        found = dive_fast.generate(there, films, processor=processor, max_new_tokens=24, engine="native", **options)
        assert found.stats["engine"] == "native" and found.texts == on_cpu.texts, options
    assert dive_fast.generate(there, films[:1], processor=processor, max_new_tokens=2).stats["engine"] == "transformers"


@gpu
@pytest.mark.alone
def test_a_cache_that_does_not_fit_says_how_much_was_needed():
    import gc

    decoder = NativeDecoder(on_gpu(tiny_model("llama")))
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - (24 << 20), dtype=torch.uint8, device="cuda")
    try:
        with pytest.raises(torch.OutOfMemoryError, match="MiB for .* are free; fewer rows at a time"):
            sessions = [decoder.session(64) for _ in range(200)]
            del sessions
    finally:
        del hog
        torch.cuda.empty_cache()
    assert len(decode(decoder.model, text_batch(), 5)[0]) == 5
