"""Options of metrics from the command line and from YAML, as far as the model that they describe."""

import json

import numpy as np
import pytest

from dive_fast import cli, config
from dive_fast.clinical import chexbert
from dive_fast.errors import InputError


@pytest.fixture
def predictions(tmp_path):
    file = tmp_path / "predictions.jsonl"
    rows = [{"id": str(i), "prediction": "no effusion", "reference": "effusion"} for i in range(2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def built(monkeypatch):
    """What labelers were made with; they call everything positive."""
    calls = []

    def labeler(*arguments):
        calls.append(arguments)
        return lambda texts: np.ones((len(texts), 14), dtype=int)

    monkeypatch.setattr(chexbert, "ChexbertLabeler", labeler)
    return calls


def test_items_and_a_file_reach_the_model_and_items_win(predictions, built, tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text("chexbert:\n  weights: a.pth\n  tokenizer: vocabulary/\n  uncertain: negative\n")
    output = tmp_path / "scores.json"
    command = ["evaluate", str(predictions), "--metrics", "chexbert", "--bootstrap", "10", "--output", str(output)]
    code = cli.main([*command, "--metric-options", str(file), "chexbert.weights=b.pth", "chexbert.batch_size=4"])
    assert code == 0, capsys.readouterr().err
    assert built == [("b.pth", "vocabulary/", None, 4)]
    scores = json.loads(output.read_text())
    assert scores["values"]["chexbert_micro_f1_14"] == 1.0
    assert scores["settings"]["chexbert"]["uncertain"] == "negative"
    assert "chexbert_macro_f1_5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["chexbert=1"], "metric option 'chexbert=1': expected metric.option=value, such as chexbert.device=cpu"),
        (["chexbert.a.b=1"], "expected metric.option=value"),
        (["nowhere.yaml"], "nowhere.yaml: .*expected the path of a YAML file"),
        (["a.yaml", "b.yaml"], "expected one YAML file, got a.yaml, b.yaml"),
        (["chexbert.wights=x"], "metric_options.chexbert: there is no option 'wights'; did you mean 'weights'"),
        (["chexbert.batch_size=many"], "batch_size: expected a whole number >= 1, got 'many'"),
        (["chexbert.labeler=mine"], "labeler: expected a callable"),
        (["bleu.weights=x"], "no metric with options is called 'bleu'"),
        (["radgraph.device=cpu"], "'radgraph' is not among metrics"),
    ],
)
def test_wrong_options_end_with_code_2_and_say_why(predictions, capsys, items, message):
    assert cli.main(["evaluate", str(predictions), "--metrics", "chexbert", "--metric-options", *items]) == 2
    said = capsys.readouterr().err
    with pytest.raises(InputError, match=message):
        raise InputError(said)


def test_no_items_are_no_options():
    assert config.load_metric_options([]) is None
