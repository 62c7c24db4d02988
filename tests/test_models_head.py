"""Losses are those of the model's own logits, whatever its family does to them behind the head."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from dive_fast import DiveConfig
from dive_fast.data.collator import ReportCollator
from dive_fast.data.encoding import ReportEncoder
from dive_fast.errors import InputError
from dive_fast.likelihood import report_nll
from dive_fast.models.head import check_head, head_of
from dive_fast.models.hidden import hidden_states
from dive_fast.models.tiny import tiny_tokenizer
from tests.training_runs import PLAIN, RECORDS, losses, run

SIZES = {
    "vocab_size": len(tiny_tokenizer()), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "granite": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=8.0),
    "cohere": lambda: transformers.CohereConfig(**SIZES),
    "cohere2": lambda: transformers.Cohere2Config(**SIZES, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES, head_dim=16, final_logit_softcapping=5.0, query_pre_attn_scalar=16
    ),
    "phi": lambda: transformers.PhiConfig(**SIZES),  # a head with a bias
}
HYBRIDS = {"lfm2": lambda: transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])}
STEERING = DiveConfig(r=4, site="block")


def make(config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config()).eval()


def own_nll(model, records) -> tuple[torch.Tensor, torch.Tensor]:
    batch = ReportCollator(ReportEncoder(tiny_tokenizer()))(records)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    targets = batch["labels"][:, 1:]
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    return each.sum(dim=1), (targets != -100).sum()


@pytest.mark.parametrize("family", CONFIGS)
def test_losses_and_perplexities_are_of_the_models_own_logits(family, tmp_path):
    model, records = make(CONFIGS[family]), RECORDS[:4]
    true, tokens = own_nll(model, records)
    found, _ = report_nll(model, records, ReportEncoder(tiny_tokenizer()))
    torch.testing.assert_close(torch.tensor(found).double(), true, rtol=1e-5, atol=1e-5)
    result = run(tmp_path, model, records, steering=STEERING, supervision=PLAIN, args={"max_steps": 1})
    assert losses(result)[0] == pytest.approx(float(true.sum() / tokens), rel=1e-5)


@pytest.mark.parametrize("family", [*CONFIGS, *HYBRIDS])
def test_the_head_gives_the_logits(family):
    model = make((CONFIGS | HYBRIDS)[family])
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with torch.no_grad():
        found, true = head_of(model).logits(hidden_states(model, inputs).final), model(**inputs).logits
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4)
    check_head(model)


@pytest.mark.parametrize("demos", ["fixed", "random"])
def test_decoders_with_states_of_other_kinds_train_on_whole_rows(tmp_path, demos):
    import dive_fast

    model = make(HYBRIDS["lfm2"])
    true, tokens = own_nll(model, RECORDS[:4])
    teacher = dive_fast.Teacher(shots=2, demos=demos)
    args = {"max_steps": 1}
    alone = run(tmp_path / "alone", model, RECORDS[:4], steering=STEERING, supervision=PLAIN, args=args)
    assert losses(alone)[0] == pytest.approx(float(true.sum() / tokens), rel=1e-5)
    run(tmp_path / "taught", make(HYBRIDS["lfm2"]), RECORDS, steering=STEERING, teacher=teacher, args=args)


def test_logits_that_are_changed_in_an_unknown_way_are_refused(tmp_path):
    class Sharpened(transformers.PhiForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.5
            return output

    model = Sharpened(CONFIGS["phi"]()).eval()
    with pytest.raises(InputError, match="model: phi does something to its logits"):
        run(tmp_path, model, steering=STEERING)
    with pytest.raises(InputError, match="model: phi does something"):
        report_nll(model, RECORDS[:2], ReportEncoder(tiny_tokenizer()))
