"""Hidden states taken at the decoder are what the head turns into the model's logits, in every family."""

import peft
import pytest
import torch

from dive_fast import DiveConfig
from dive_fast.models.head import head_of
from dive_fast.models.hidden import hidden_states
from dive_fast.models.spec import decoder_of, spec_of, text_config_of
from tests.tiny_models import FAMILIES, randomize_adapters, text_batch, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_final_states_times_the_head_are_the_logits(family):
    base, batch = tiny_model(family), text_batch()
    model = randomize_adapters(peft.get_peft_model(base, DiveConfig(r=4, scope="all")).eval())
    states = hidden_states(model, batch, layers=True)
    logits = model(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(states.final[real] @ head_of(base).weight.T, logits[real], atol=1e-5, rtol=1e-5)
    assert len(states.layers) == len(decoder_of(base).layers) == text_config_of(base).num_hidden_layers
    norm = decoder_of(base).norm
    torch.testing.assert_close(norm(states.layers[-1])[real], states.final[real], atol=1e-5, rtol=1e-5)
    head = head_of(base)
    assert spec_of(base) is not None and (head.softcap, head.scale) == (None, 1.0)


def test_the_models_own_head_is_kept_idle():
    model, batch, seen = tiny_model("llama"), text_batch(), []
    model.lm_head.register_forward_hook(lambda m, args, output: seen.append(output.shape))
    hidden_states(model, batch)
    assert seen == [torch.Size([3, 0, 64])]
