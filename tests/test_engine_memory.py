"""Addresses that the engine is given: checked where they are taken, alive as long as they are used."""

import gc
import threading
import weakref

import peft
import psutil
import pytest
import torch
from torch import nn

import dive_fast
from dive_fast import native
from dive_fast.decode.native import NativeDecoder
from dive_fast.decode.plan import Unsupported
from dive_fast.errors import InputError
from tests.engine_checks import REQUEST, close, step_logits, whole_logits
from tests.tiny_models import randomize_adapters, text_batch, tiny_model


class Tagged(torch.Tensor):
    """A tensor of a class of its own."""


def replace(module: nn.Module, values: torch.Tensor, name: str = "weight") -> None:
    delattr(module, name)
    setattr(module, name, values)


def q_proj(model):
    return model.model.layers[1].self_attn.q_proj


def norm(model):
    return model.model.layers[1].input_layernorm


def rows_gone(model):
    weight = q_proj(model).weight
    weight.untyped_storage().resize_(weight.untyped_storage().nbytes() - 4)


REFUSED = {
    "meta": (lambda m: replace(q_proj(m), torch.empty(32, 32, device="meta")), "meta"),
    "meta norm": (lambda m: replace(norm(m), torch.empty(32, device="meta")), "meta"),
    "sparse": (lambda m: replace(q_proj(m), torch.eye(32).to_sparse()), "sparse"),
    "sparse norm": (lambda m: replace(norm(m), torch.ones(32).to_sparse()), "sparse"),
    "subclass": (lambda m: replace(q_proj(m), torch.eye(32).as_subclass(Tagged)), "Tagged"),
    "integers": (lambda m: replace(q_proj(m), torch.ones(32, 32, dtype=torch.int32)), "int32"),
    "float64": (lambda m: replace(q_proj(m), torch.eye(32, dtype=torch.float64)), "float64"),
    "shape": (lambda m: replace(q_proj(m), torch.ones(16, 32)), r"\(16, 32\)"),
    "dimensions": (lambda m: replace(q_proj(m), torch.ones(32)), r"\(32,\)"),
    "expanded": (lambda m: replace(q_proj(m), torch.ones(1, 32).expand(32, 32)), "follow each other"),
    "transposed": (lambda m: replace(q_proj(m), torch.rand(32, 32).t()), "follow each other"),
    "norm of another size": (lambda m: replace(norm(m), torch.ones(16)), r"\(16,\)"),
    "bias of another size": (lambda m: replace(q_proj(m), torch.ones(1), "bias"), r"\(1,\)"),
    "memory taken away": (rows_gone, "taken away"),
    "fewer embeddings than the head": (
        lambda m: replace(m.model.embed_tokens, m.lm_head.weight.detach()[:-1]),
        "the head knows 64 tokens",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_parameters_that_are_not_what_they_should_be_are_refused(what):
    model = tiny_model("llama")
    change, reason = REFUSED[what]
    change(model)
    with pytest.raises(Unsupported, match=reason):
        NativeDecoder(model)


def test_matrices_with_room_between_their_rows_are_used_where_they_are():
    model, batch = tiny_model("llama"), text_batch()
    wide = torch.randn(32, 50) / 6
    replace(q_proj(model), wide[:, 7:39])
    assert wide[:, 7:39].data_ptr() in [layer["q"][0] for layer in NativeDecoder(model).plan.values["layers"]]
    forced = torch.randint(3, 60, (3, 4))
    close(step_logits(model, batch, forced), whole_logits(model, batch, forced))


def test_adapters_of_rank_one_may_have_any_stride_where_there_is_one_element():
    model = peft.get_peft_model(tiny_model("llama"), dive_fast.DiveConfig(r=1)).eval()
    randomize_adapters(model)
    for name, parameter in model.named_parameters():
        if "dive_" in name and parameter.dim() == 2 and 1 in parameter.shape:
            parameter.data = parameter.data.t().contiguous().t()
    batch, forced = text_batch(), torch.randint(3, 60, (3, 4))
    close(step_logits(model, batch, forced), whole_logits(model, batch, forced))


def test_a_session_outlives_its_decoder_and_the_model():
    model, batch = tiny_model("qwen2"), text_batch(1)
    expected = dive_fast.generate(model, batch, max_new_tokens=12, engine="native").sequences[0].tolist()
    decoder = NativeDecoder(model)
    session = decoder.session(1)
    decoder.submit(session, batch, None, [REQUEST | {"max_new_tokens": 12, "eos": [2]}])
    gone = weakref.ref(model)
    del model, decoder
    gc.collect()
    assert gone() is None
    # What was freed would be written over.
    junk = [torch.full((32, 32), float("nan")) for _ in range(200)]
    session.run(on_token=None, cancelled=None, until_free=0)
    assert session.take(0)[0] == expected and len(junk) == 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_an_optimizer_step_between_two_calls_is_seen(dtype, weights):
    model, batch = tiny_model("llama").to(dtype), text_batch()
    options = {"max_new_tokens": 3, "engine": "native", "log_probs": True, "weights": weights}
    before = dive_fast.generate(model, batch, **options)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    after = dive_fast.generate(model, batch, **options)
    assert not torch.equal(before.log_probs[0], after.log_probs[0])
    fresh = tiny_model("llama").to(dtype)
    fresh.load_state_dict(model.state_dict())
    anew = dive_fast.generate(fresh, batch, **options)
    for ours, theirs in zip(after.log_probs, anew.log_probs, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [0, 1 << 16])
def test_memory_that_moves_under_a_decoder_is_noticed(size):
    model = tiny_model("llama")
    decoder = NativeDecoder(model)
    q_proj(model).weight.untyped_storage().resize_(size)
    with pytest.raises(InputError, match="moved or freed"):
        decoder.submit(decoder.session(1), text_batch(1), None, [REQUEST | {"max_new_tokens": 1}])


def test_caches_of_another_shape_are_refused(monkeypatch):
    model = tiny_model("llama")
    decoder = NativeDecoder(model)
    run = decoder.prefill.run

    def shorter(*args):
        found = run(*args)
        for prompt in found:
            prompt.layers[1] = tuple(x[:, 1:] for x in prompt.layers[1])
        return found

    monkeypatch.setattr(decoder.prefill, "run", shorter)
    with pytest.raises(InputError, match="its cache holds states of"):
        decoder.submit(decoder.session(1), text_batch(1), None, [REQUEST | {"max_new_tokens": 1}])


def test_a_session_belongs_to_one_call_at_a_time():
    decoder = NativeDecoder(tiny_model("llama"))
    session = decoder.session(1, threads=2)
    decoder.submit(session, text_batch(1), None, [REQUEST | {"max_new_tokens": 1 << 20}])
    errors = []

    def call_back(index, token):
        for call in (lambda: session.run(on_token=None, cancelled=None, until_free=0), lambda: session.take(0)):
            with pytest.raises(RuntimeError, match="under way") as error:
                call()
            errors.append(error)
        if len(errors) == 2:
            other.start()
            other.join()
        session.cancel()

    def from_another_thread():
        with pytest.raises(RuntimeError, match="under way") as error:
            decoder.submit(session, text_batch(1), None, [REQUEST | {"max_new_tokens": 1}])
        errors.append(error)

    other = threading.Thread(target=from_another_thread)
    session.run(on_token=call_back, cancelled=None, until_free=0)
    assert session.take(0)[2] == "cancelled" and len(errors) == 3


def test_an_unfinished_outcome_can_be_looked_at():
    decoder = NativeDecoder(tiny_model("llama"))
    session = decoder.session(2)
    decoder.submit(session, text_batch(2), None, [REQUEST | {"max_new_tokens": n} for n in (5, 40)])
    session.run(on_token=None, cancelled=None, until_free=1)
    early, _, finish = session.take(1)
    session.run(on_token=None, cancelled=None, until_free=0)
    late, _, _ = session.take(1)
    assert finish == "unfinished" and late[: len(early)] == early and (len(early), len(late)) == (5, 40)


def test_temperatures_without_a_finite_inverse_are_greedy():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.9])
    for temperature in (1e-38, 1e-40, 1e-45):
        for top_p, min_p in ((1.0, 0.0), (0.5, 0.0), (1.0, 0.5)):
            drawn = native.load().engine.sample(
                logits=logits.data_ptr(), vocabulary=4, temperature=temperature, top_k=0, top_p=top_p, min_p=min_p,
                seed=0, stream=0, draws=3,
            )  # fmt: skip
            assert drawn == [1, 1, 1]


def test_calls_leave_no_memory_behind(monkeypatch):
    # Two threads would meet hundreds of times a call, which takes its time where others want the cores.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    model, batch = tiny_model("llama"), text_batch()
    adapted = randomize_adapters(peft.get_peft_model(model, dive_fast.DiveConfig(r=4)).eval())
    process = psutil.Process()

    def call(index):
        dive_fast.generate(adapted, batch, max_new_tokens=8, engine="native", temperature=0.5, seed=index)

    for index in range(40):
        call(index)
    gc.collect()
    before = process.memory_info().rss
    for index in range(200):
        call(index)
    gc.collect()
    # A plan, a session or a cache that stayed would be 16 KiB and more each time, tiny as the model is.
    assert process.memory_info().rss - before < 2 << 20
