"""The whole path for another domain: the shipped configuration, its lexicon, training, generation, scores."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import dive_fast
from dive_fast import config, eval_reports
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer
from dive_fast.supervision.lexicon import LexiconTagger
from dive_fast.supervision.weights import decisive_mask

ROOT = Path(__file__).parents[1]
LEXICON = "configs/bridges/lexicon.yaml"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.chdir(ROOT)  # paths in a configuration start from the current directory
    return config.load_config("configs/bridges/train.yaml")


def train(run, folder, **training):
    return dive_fast.train(
        tiny_llama(),
        config.load_records(run.data),
        folder,
        processor=tiny_tokenizer(),
        eval_dataset=config.load_records(run.eval_data),
        steering=dive_fast.DiveConfig(**run.steering),
        supervision=dive_fast.Supervision(**run.supervision),
        args=run.training | {"disable_tqdm": True, "save_strategy": "no", "use_cpu": True} | training,
    )


def test_the_configuration_trains_and_its_scores_count_its_own_findings(run, tmp_path, monkeypatch):
    written = ["Free of cracks. Signs of a leak.", "Cable is fine, no corrosion.", "Loose fasteners at the splice."]
    references = [record.report for record in config.load_records(run.eval_data)]
    assert references == [
        "Suspected corrosion under the sheath. No fracture.",
        "Free of cracks and spalls. Leak at the drain pipe.",
        "Loose fasteners at the splice. Signs of cracking at the weld.",
    ]
    monkeypatch.setattr(
        eval_reports,
        "generate",
        lambda *args, **options: SimpleNamespace(texts=written, finish_reasons=["eos"] * 3, stats={"engine": "none"}),
    )
    result = train(run, tmp_path / "run")
    assert [entry["step"] for entry in result.history if "loss" in entry] == [1, 2, 3]
    # Stated, report by report: corrosion uncertain, crack absent; crack absent, spalling absent, leak present; fastener
    # present, crack uncertain. Written: crack absent, leak uncertain; corrosion absent; fastener present. Two of the
    # four written are right, of seven stated.
    assert result.metrics["eval_decisive_f1"] == pytest.approx(2 * 2 / (7 + 4))
    scores = dive_fast.evaluate(written, references, metrics="decisive", tagger=LexiconTagger(LEXICON), bootstrap=0)
    assert scores["decisive_f1"] == result.metrics["eval_decisive_f1"]
    assert scores.per_class["Loose Fastener/present"]["f1"] == 1.0
    assert set(scores.per_class) == {
        "Corrosion/absent",
        "Corrosion/uncertain",
        "Crack/absent",
        "Crack/uncertain",
        "Leak/present",
        "Leak/uncertain",
        "Loose Fastener/present",
        "Spalling/absent",
    }


def test_the_trained_adapter_writes_reports_that_its_lexicon_scores(run, tmp_path):
    result = train(run, tmp_path / "run")
    held_out = config.load_records(run.eval_data)
    output = dive_fast.generate(result.model, held_out, processor=tiny_tokenizer(), max_new_tokens=8)
    scores = dive_fast.evaluate(
        output.texts, [r.report for r in held_out], metrics="decisive", tagger=LexiconTagger(LEXICON)
    )
    assert 0 <= scores["decisive_f1"] <= 1 and scores.tagger == "LexiconTagger"


def test_the_words_of_the_domain_are_up_weighted(run):
    supervision = dive_fast.Supervision(**run.supervision)
    text = "No cracks at the weld."
    spans = supervision.span_tagger()(text)
    assert [(text[s.start : s.end], s.label) for s in spans] == [("cracks", ("Crack", "absent"))]
    assert decisive_mask([(0, 2), (2, 9), (9, 12)], spans) == [False, True, False]
    # Nothing of it is radiology.
    assert LexiconTagger()("Standing water at the joint, rusted through.") == []
