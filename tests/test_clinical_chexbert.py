"""The CheXbert labeler: the published layout, the authors' preprocessing, and files that are not CheXbert's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

import dive_fast
from dive_fast.clinical.chexbert import LABELS, TOP_5, ChexbertLabeler, ChexbertModel
from dive_fast.errors import InputError
from tests.radgraph_layout import write_encoder

TEXTS = [
    "No pleural effusion.",
    "",
    "  Heart size\r\n is\tnormal.\u2028\n\nThe right lung is clear  ",
    "small opacity " * 600,
    "consolidation",
    "\u00e9\U0001fac1 [SEP] left [MASK] base",
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Weights under the published names with the published heads, around an encoder of two small layers."""
    folder = tmp_path_factory.mktemp("chexbert")
    write_encoder(folder / "tokenizer")
    config = BertConfig.from_pretrained(folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ChexbertModel(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:  # far from their initial values, so that reports differ in their labels
                parameter.data.normal_(std=1.0)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    content = {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {}}
    torch.save(content, folder / "chexbert.pth")
    return SimpleNamespace(folder=folder, config=config, tokenizer=str(folder / "tokenizer"), state=state)


def labeler(small, path=None, **options):
    return ChexbertLabeler(
        str(path or small.folder / "chexbert.pth"), small.tokenizer, "cpu", config=small.config, **options
    )


def test_the_model_has_the_published_names_and_shapes():
    layer = {
        "attention.self.query": (768, 768),
        "attention.self.key": (768, 768),
        "attention.self.value": (768, 768),
        "attention.output.dense": (768, 768),
        "attention.output.LayerNorm": (768,),
        "intermediate.dense": (3072, 768),
        "output.dense": (768, 3072),
        "output.LayerNorm": (768,),
    }
    modules = {f"bert.encoder.layer.{i}.{name}": shape for i in range(12) for name, shape in layer.items()}
    modules |= {"bert.embeddings.LayerNorm": (768,), "bert.pooler.dense": (768, 768)}
    modules |= {f"linear_heads.{i}": (4 if i < 13 else 2, 768) for i in range(14)}
    published = {f"{name}.weight": shape for name, shape in modules.items()}
    published |= {f"{name}.bias": shape[:1] for name, shape in modules.items()}
    for name, rows in (("word", 30522), ("position", 512), ("token_type", 2)):
        published[f"bert.embeddings.{name}_embeddings.weight"] = (rows, 768)
    with torch.device("meta"):
        model = ChexbertModel(BertConfig())
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == published


def test_the_labels_are_in_the_published_order():
    assert len(LABELS) == 14 and LABELS[1] == "Cardiomegaly" and LABELS[9] == "Pleural Effusion"
    assert [LABELS.index(label) for label in TOP_5] == [1, 4, 5, 7, 9] and LABELS[13] == "No Finding"


def one_by_one(small, texts):
    """The authors' steps, spelled out: whole text in pieces, cut to 511 and [SEP], one report at a time, no padding."""
    tokenizer = BertTokenizer.from_pretrained(small.tokenizer)
    bert = BertModel(small.config).eval()
    bert.load_state_dict({k[12:]: v for k, v in small.state.items() if k.startswith("module.bert.")})
    rows = []
    for text in texts:
        ids = tokenizer(" ".join(text.split()))["input_ids"]
        if len(ids) > 512:
            ids = ids[:511] + [tokenizer.sep_token_id]
        with torch.no_grad():
            state = bert(torch.tensor([ids]))[0][:, 0]
            heads = [f"module.linear_heads.{i}" for i in range(14)]
            logits = [state @ small.state[f"{head}.weight"].T + small.state[f"{head}.bias"] for head in heads]
            rows.append([int(scores.argmax()) for scores in logits])
    return np.array(rows)


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_labels_are_those_of_one_report_at_a_time(small, batch_size):
    expected = one_by_one(small, TEXTS)
    found = labeler(small, batch_size=batch_size)(TEXTS)
    assert found.shape == (6, 14) and (found == expected).all()
    assert len(np.unique(expected[:, :13])) == 4 and len(np.unique(expected, axis=0)) > 3, "too easy"


def test_no_texts_are_no_rows(small):
    assert labeler(small)([]).shape == (0, 14)


def test_the_folder_and_the_file_are_the_same(small, tmp_path):
    assert labeler(small, small.folder).fingerprint == labeler(small).fingerprint
    torch.save({"model_state_dict": {k: v + 1 for k, v in small.state.items()}}, tmp_path / "other.pth")
    assert labeler(small, tmp_path / "other.pth").fingerprint != labeler(small).fingerprint


def test_the_position_buffer_of_older_releases_is_allowed_where_it_is_one(small, tmp_path):
    name = "module.bert.embeddings.position_ids"
    torch.save({"model_state_dict": small.state | {name: torch.arange(512)[None]}}, tmp_path / "a.pth")
    assert (labeler(small, tmp_path / "a.pth")(TEXTS) == labeler(small)(TEXTS)).all()
    torch.save({"model_state_dict": small.state | {name: torch.zeros(1, 512)}}, tmp_path / "b.pth")
    with pytest.raises(InputError, match="unexpected module.bert.embeddings.position_ids"):
        labeler(small, tmp_path / "b.pth")


class NotATensor:
    pass


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


HEAD = "module.linear_heads.13.weight"
WRONG = {
    "missing": (lambda s: {"model_state_dict": without(s, HEAD)}, f"is not CheXbert's: missing {HEAD}$"),
    "unexpected": (
        lambda s: {"model_state_dict": s | {"module.x": s[HEAD]}},
        "is not CheXbert's: unexpected module.x$",
    ),
    "both, many": (
        lambda s: {"model_state_dict": {"module.a": s[HEAD], "b": s[HEAD]}},
        r"missing module.bert.embeddings.word_embeddings.weight, .* and \d+ more and unexpected b, module.a$",
    ),
    "no prefix": (
        lambda s: {"model_state_dict": {k[7:]: v for k, v in s.items()}},
        "missing module.bert.emb.* unexpected bert",
    ),
    "shape": (
        lambda s: {"model_state_dict": s | {HEAD: torch.zeros(4, 32)}},
        r"another size: module.linear_heads.13.weight is \(4, 32\), CheXbert's is \(2, 32\)",
    ),
    "no state dict": (lambda s: {"state_dict": s}, "holds the keys state_dict; CheXbert's file holds"),
    "not tensors": (lambda s: {"model_state_dict": {"module.a": 1}}, "CheXbert's file holds tensors under"),
    "a tensor": (lambda s: torch.zeros(3), "holds Tensor; CheXbert's file holds"),
    "an object": (lambda s: {"model_state_dict": NotATensor()}, "is not a whole PyTorch file of tensors"),
}


@pytest.mark.parametrize("how", WRONG)
def test_another_file_is_refused_with_its_difference(small, tmp_path, how):
    make, message = WRONG[how]
    torch.save(make(small.state), tmp_path / "wrong.pth")
    with pytest.raises(InputError, match=f"weights: .*wrong.pth .*{message}"):
        labeler(small, tmp_path / "wrong.pth")


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 cut"])
def test_what_is_no_pytorch_file_is_refused(small, tmp_path, content):
    (tmp_path / "chexbert.pth").write_bytes(content)
    with pytest.raises(InputError, match="is not a whole PyTorch file of tensors .*download it again"):
        labeler(small, tmp_path)


def test_a_file_cut_short_is_refused(small, tmp_path):
    whole = (small.folder / "chexbert.pth").read_bytes()
    (tmp_path / "chexbert.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is not a whole PyTorch file"):
        labeler(small, tmp_path)


def score(**options):
    return dive_fast.evaluate(["a"], ["a"], metrics=("chexbert",), metric_options={"chexbert": options})


def test_the_public_way_wants_the_published_size(small):
    with pytest.raises(InputError, match="word pieces, CheXbert's bert-base-uncased 30522"):
        score(weights=str(small.folder), tokenizer=small.tokenizer)


def test_what_is_not_there_is_named(small, tmp_path):
    with pytest.raises(InputError, match="chexbert.pth is missing; expected the path of chexbert.pth, or a hub id"):
        labeler(small, tmp_path)
    with pytest.raises(InputError, match="weights: nowhere/chexbert.pth is missing"):
        labeler(small, "nowhere/chexbert.pth")  # of the form of a hub id
    with pytest.raises(InputError, match="tokenizer: 'nowhere' cannot be loaded .* of bert-base-uncased"):
        score(weights=str(small.folder), tokenizer="nowhere")
    with pytest.raises(InputError, match="tokenizer: 'bert-base-uncased' cannot be loaded"):
        score(weights=str(small.folder))
    with pytest.raises(InputError, match="chexbert.pth of 'StanfordAIMI/RRG_scorers' cannot be downloaded"):
        ChexbertLabeler(tokenizer=small.tokenizer, config=small.config, device="cpu")


def test_the_hubs_file_is_asked_for_by_name(small, monkeypatch):
    asked = []
    file = str(small.folder / "chexbert.pth")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda **what: asked.append(what) or file)
    assert labeler(small, "someone/scorers").fingerprint == labeler(small).fingerprint
    assert asked == [{"repo_id": "someone/scorers", "filename": "chexbert.pth"}]


@pytest.mark.gpu
def test_a_gpu_labels_alike(small):
    on_gpu = ChexbertLabeler(str(small.folder / "chexbert.pth"), small.tokenizer, "cuda", config=small.config)
    assert next(on_gpu.model.parameters()).is_cuda
    assert (on_gpu(TEXTS) == labeler(small)(TEXTS)).all()
