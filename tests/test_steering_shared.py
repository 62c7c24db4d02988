"""One steered model in several hands: threads that run it at once, adapters that come and go."""

import threading

import peft
import pytest
import torch

import dive_fast
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer
from tests.tiny_models import randomize_adapters

PROMPTS = ["Indication: cough.", "Indication: fever and chest pain for three days. Tags: normal.", "Tags: effusion."]
ROUNDS = 12


def model_with(scopes, **config):
    model = peft.get_peft_model(tiny_llama(), dive_fast.DiveConfig(r=4, scope=scopes[0], **config), "first").eval()
    for name, scope in zip(("second", "third"), scopes[1:], strict=False):
        model.add_adapter(name, dive_fast.DiveConfig(r=4, scope=scope))
    return randomize_adapters(model)


def in_threads(jobs) -> list:
    """What the jobs, run at once, return."""
    found, barrier = [None] * len(jobs), threading.Barrier(len(jobs))

    def work(index):
        barrier.wait()
        found[index] = [jobs[index]() for _ in range(ROUNDS)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("engine", ["native", "transformers"])
@pytest.mark.parametrize("scope", ["response", "all"])
def test_threads_that_generate_at_once_get_what_they_get_alone(engine, scope):
    model, tokenizer = model_with([scope, scope]), tiny_tokenizer()

    def texts(name, prompt):
        output = dive_fast.generate(
            model, [prompt], processor=tokenizer, adapter_names=[name], engine=engine, max_new_tokens=6
        )
        return output.texts[0]

    calls = [(name, prompt) for name in ("first", "second", "__base__") for prompt in PROMPTS[:2]]
    alone = [texts(*call) for call in calls]
    together = in_threads([lambda call=call: texts(*call) for call in calls])
    assert together == [[text] * ROUNDS for text in alone]
    assert [texts(*call) for call in calls] == alone


def test_what_one_call_says_does_not_reach_another_thread():
    model = model_with(["all"])
    seen = []
    with model.base_model.unsteered(), model.base_model.rows_steered_by(["__base__"]):
        thread = threading.Thread(target=lambda: seen.append(model.base_model.acting_adapters()))
        thread.start()
        thread.join()
        assert model.base_model.acting_adapters() == []
    assert seen == [["first"]] and model.base_model.acting_adapters() == ["first"]


@pytest.mark.parametrize("scopes", [("all", "all", "all"), ("all", "response", "all")], ids="-".join)
def test_all_layers_go_on_with_the_same_adapter_where_the_active_one_is_deleted(scopes):
    """The first adapter is on one layer only, so that the layers do not know the same names."""
    model = model_with(scopes, layers_to_transform=[0])
    inputs = tiny_tokenizer()(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    model.set_adapter("first")
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_adapter("third")
        model.delete_adapter("third")
        assert model.active_adapters == ["first"]
        assert torch.equal(model(**inputs).logits, expected)
    model.delete_adapter("first")
    assert model.active_adapters == ["second"]
    assert {tuple(layer.steering.active_adapters) for layer in model.get_base_model().model.layers} == {("second",)}
