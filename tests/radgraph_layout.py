"""Random weights in exactly RadGraph's published layout, with a tiny encoder; needs the radgraph package."""

import json
from pathlib import Path

import torch

from dive_fast.clinical.tokenizer_methods import tokenizer_methods

NER_LABELS = [
    "",
    "Anatomy::definitely present",
    "Observation::definitely absent",
    "Observation::definitely present",
    "Observation::uncertain",
]
RELATION_LABELS = ["modify", "located_at", "suggestive_of"]
WORDS = "no pleural effusion right left lung is clear small opacity base consolidation heart size normal seen".split()


def write_encoder(folder: Path) -> Path:
    """A BERT of two small layers: configuration and tokenizer, no weights, as the published archives refer to one."""
    from transformers import BertConfig, BertTokenizer

    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS,
        *",.()/:-%",
        *"abcdefghijklmnopqrstuvwxyz0123456789",
    ]
    pieces += [f"##{character}" for character in "abcdefghijklmnopqrstuvwxyz0123456789"]
    BertConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=512,
    ).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


def write_radgraph(root: Path, model_type: str = "radgraph") -> Path:
    """ROOT/<model_type>/{config.json, vocabulary/, weights.th}; returns ROOT."""
    from radgraph.allennlp.common.params import Params
    from radgraph.allennlp.data import Vocabulary
    from radgraph.allennlp.modules import text_field_embedders, token_embedders
    from radgraph.dygie.models import dygie

    encoder = write_encoder(root / "encoder")
    folder = root / model_type
    (folder / "vocabulary").mkdir(parents=True)
    (folder / "vocabulary" / "non_padded_namespaces.txt").write_text("*tags\n*labels\n")
    for kind, labels in (("ner", NER_LABELS), ("relation", RELATION_LABELS)):
        (folder / "vocabulary" / f"{model_type}__{kind}_labels.txt").write_text("\n".join(labels) + "\n")
    bert = {"model_name": str(encoder), "max_length": 512}
    modules = {
        "coref": {"coref_prop": 0, "max_antecedents": 100, "spans_per_word": 0.3},
        "events": {
            "argument_spans_per_word": 0.8,
            "loss_weights": {"arguments": 1, "trigger": 1},
            "trigger_spans_per_word": 0.3,
        },
        "ner": {},
        "relation": {"spans_per_word": 0.5},
    }
    model = {
        "feature_size": 20,
        "feedforward_params": {"dropout": 0.4, "hidden_dims": 16, "num_layers": 2},
        "loss_weights": {"coref": 0, "events": 0, "ner": 0.2, "relation": 1},
        "max_span_width": 8,
        "modules": modules,
        "target_task": "relation",
    }
    dropped = {"type": "dygie", "initializer": {}, "module_initializer": {}}
    embedder = {"token_embedders": {"bert": {"type": "pretrained_transformer_mismatched", **bert}}}
    indexers = {"bert": {"type": "pretrained_transformer_mismatched", **bert}}
    reader = {"type": "dygie", "max_span_width": 8, "token_indexers": indexers}
    config = {"dataset_reader": reader, "model": {**model, **dropped, "embedder": embedder}}
    (folder / "config.json").write_text(json.dumps(config, indent=1))

    with tokenizer_methods(), torch.random.fork_rng():
        torch.manual_seed(0)
        inner = token_embedders.PretrainedTransformerMismatchedEmbedder(**bert)
        network = dygie.DyGIE(
            vocab=Vocabulary.from_files(str(folder / "vocabulary")),
            embedder=text_field_embedders.BasicTextFieldEmbedder({"bert": inner}),
            **{**model, "modules": Params(modules).duplicate()},
        )
        # As initialised, every span scores alike; spread out, some are entities of each kind and most are not.
        for name, parameter in network.named_parameters():
            if "_scorers" in name or name.endswith("linear_layers.1.weight"):
                parameter.data.normal_(std=1.5)
            if name.endswith(("ner_labels.1._module.bias", "relation_labels.bias")):
                parameter.data.sub_(8.0)
    torch.save(network.state_dict(), folder / "weights.th")
    return root
