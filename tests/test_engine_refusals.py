"""What the decoding engine refuses, with which reason."""

import peft
import pytest
import torch

import dive_fast
from dive_fast.decode.native import NativeDecoder
from dive_fast.decode.plan import Unsupported
from dive_fast.errors import InputError
from tests.engine_checks import (
    decode,
)
from tests.tiny_models import (
    text_batch,
    tiny_model,
)


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


def sharpened(model):
    from transformers import LlamaForCausalLM

    class Sharpened(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * torch.linspace(-1, 1, output.logits.shape[-1])
            return output

    return Sharpened(model.config).eval()


def wrapped(model):
    plain = model.forward
    model.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    return model


@pytest.mark.parametrize("change, reason", [(sharpened, "Sharpened has a forward of its own"), (wrapped, "replaced")])
def test_code_around_the_decoder_is_not_passed_by(change, reason):
    model, batch = change(tiny_model("llama")), text_batch()
    with pytest.raises(InputError, match=reason):
        dive_fast.generate(model, batch, max_new_tokens=3, engine="native")
    found = dive_fast.generate(model, batch, max_new_tokens=3)
    assert found.stats["engine"] == "transformers" and reason in found.stats["not_native"]


RULES = {
    "suppress_tokens": [5],
    "bad_words_ids": [[5]],
    "no_repeat_ngram_size": 2,
    "forced_eos_token_id": 2,
    "min_length": 14,
}


@pytest.mark.parametrize("name", RULES)
def test_rules_of_the_models_generation_config_are_followed_or_refused(name):
    model, batch = tiny_model("llama"), text_batch()
    setattr(model.generation_config, name, RULES[name])
    expected = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    found = dive_fast.generate(model, batch, max_new_tokens=6)
    rows = [row[: len(own)].tolist() for row, own in zip(expected, found.sequences, strict=True)]
    assert [own.tolist() for own in found.sequences] == rows
    assert f"generation_config has {name}=" in found.stats["not_native"]
    with pytest.raises(InputError, match=name):
        dive_fast.generate(model, batch, max_new_tokens=6, engine="native")


def test_models_without_a_list_of_decoder_layers_generate_by_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=2))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))
    for model in (gpt.eval(), mamba.eval()):
        found = dive_fast.generate(model, text_batch(), max_new_tokens=3)
        assert found.stats["engine"] == "transformers" and found.stats["not_native"]
        assert [len(row) for row in found.sequences] == [3, 3, 3]
