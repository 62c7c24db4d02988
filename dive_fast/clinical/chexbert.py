"""The CheXbert labeler (Smit et al., EMNLP 2020): blank, positive, negative or uncertain for 14 observations.

A BERT base model whose [CLS] state goes through 13 linear heads of four classes and, for "No Finding", one of two.
Layout of the published `chexbert.pth`, preprocessing and truncation after the public code of its authors
(stanfordmlgroup/CheXbert: `label.py`, `bert_tokenizer.py`).
"""

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dive_fast.clinical import weights as weights_files
from dive_fast.clinical.settings import check_common
from dive_fast.devices import torch_device
from dive_fast.errors import InputError

FILE = "chexbert.pth"
LABELS = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices", "No Finding",
)  # fmt: skip
TOP_5 = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
BLANK, POSITIVE, NEGATIVE, UNCERTAIN = range(4)
CLASSES = (4,) * 13 + (2,)  # "No Finding" is blank or positive

PREFIX = "module."  # the weights were saved from torch's DataParallel
# A buffer that older releases of transformers saved with every BERT; it holds 0, 1, 2, ...
POSITION_IDS = "bert.embeddings.position_ids"

Labeler = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class ChexbertSettings:
    """Options of the metric `chexbert`.

    Args:
        weights: a hub id, or the path of `chexbert.pth` or of the folder that holds it.
        tokenizer: that of bert-base-uncased, by hub id or from a folder with its `vocab.txt`.
        uncertain: what an uncertain observation counts as, "positive" (the custom of report generation) or "negative".
        device: "cpu", "cuda", "cuda:1"; None: a GPU where there is one.
        batch_size: reports at a time.
        labeler: another `texts -> classes [N, 14]` in place of CheXbert's; then the options of the model do not apply.

    Raises:
        InputError: an option of the wrong type or out of range.
    """

    weights: str = weights_files.RRG_SCORERS
    tokenizer: str = "bert-base-uncased"
    uncertain: str = "positive"
    device: str | None = None
    batch_size: int = 32
    labeler: Labeler | None = None

    def __post_init__(self):
        check_common(self.weights, self.device, self.batch_size)
        if self.uncertain not in ("positive", "negative"):
            raise InputError(f"uncertain: expected 'positive' or 'negative', got {self.uncertain!r}")
        if not isinstance(self.tokenizer, str) or not self.tokenizer:
            raise InputError(f"tokenizer: expected a hub id or a folder, got {self.tokenizer!r}")
        if self.labeler is not None and not callable(self.labeler):
            raise InputError(f"labeler: expected a callable texts -> classes [N, 14], got {self.labeler!r}")

    def build(self) -> Labeler:
        """The labeler with its model; raises InputError where its files are missing or do not fit."""
        return self.labeler or ChexbertLabeler(self.weights, self.tokenizer, self.device, self.batch_size)

    def loaded(self) -> "ChexbertSettings":
        """The same with a labeler that all calls share, so that its model stays in memory."""
        return replace(self, labeler=self.build())


class ChexbertModel(nn.Module):
    """The network, with the names of the published weights."""

    def __init__(self, config):
        super().__init__()
        from transformers import BertModel

        self.bert = BertModel(config)
        self.linear_heads = nn.ModuleList(nn.Linear(config.hidden_size, classes) for classes in CLASSES)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[torch.Tensor]:
        """14 tensors of logits [B, 4 or 2] for tokens [B, T]."""
        state = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        return [head(state) for head in self.linear_heads]


class ChexbertLabeler:
    """Callable `texts -> classes [N, 14]` (int64), columns as in LABELS, values BLANK, POSITIVE, NEGATIVE, UNCERTAIN.

    White space is collapsed to single blanks; of a report the first 510 word pieces count, between [CLS] and [SEP]. A
    text without words is [CLS] [SEP] alone, as in the authors' code, and gets whatever labels the weights give that.

    Args:
        weights, tokenizer, device, batch_size: as in `ChexbertSettings`.
        config: a `transformers.BertConfig` other than bert-base-uncased's, for weights of that shape.

    Attributes:
        fingerprint: sha256 of the weights' file.

    Raises:
        InputError: missing, damaged or mismatched weights (names the keys), another model's tokenizer, no such device.
    """

    def __init__(
        self,
        weights: str = weights_files.RRG_SCORERS,
        tokenizer: str = "bert-base-uncased",
        device: str | None = None,
        batch_size: int = 32,
        config=None,
    ):
        from transformers import BertConfig

        config = config or BertConfig()
        self.device, self.batch_size = torch_device(device), batch_size
        self.max_tokens = config.max_position_embeddings
        path = _find(weights)
        self.tokenizer = _tokenizer(tokenizer, config.vocab_size)
        self.fingerprint = weights_files.fingerprint([path])
        with torch.random.fork_rng(devices=[]):  # of the initial values nothing is left
            self.model = ChexbertModel(config)
        self.model.load_state_dict(_checked_weights(path, self.model.state_dict()))
        self.model.eval().to(self.device)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        encoded = [self._token_ids(text) for text in texts]
        classes = np.empty((len(encoded), len(LABELS)), dtype=np.int64)
        # Neighbours in length share a batch, so that little of it is padding.
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            classes[rows] = self._label([encoded[i] for i in rows])
        return classes

    def _token_ids(self, text: str) -> list[int]:
        pieces = self.tokenizer.tokenize(" ".join(text.split()))[: self.max_tokens - 2]
        return [
            self.tokenizer.cls_token_id,
            *self.tokenizer.convert_tokens_to_ids(pieces),
            self.tokenizer.sep_token_id,
        ]

    @torch.inference_mode()
    def _label(self, encoded: list[list[int]]) -> np.ndarray:
        lengths = torch.tensor([len(ids) for ids in encoded])
        padded = nn.utils.rnn.pad_sequence(
            [torch.tensor(ids) for ids in encoded], batch_first=True, padding_value=self.tokenizer.pad_token_id
        )
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        logits = self.model(padded.to(self.device), mask.long().to(self.device))
        return torch.stack([scores.argmax(dim=1) for scores in logits], dim=1).cpu().numpy()


def _find(weights: str) -> Path:
    if weights_files.is_hub_id(weights):
        return weights_files.download(weights, FILE)
    path = Path(weights).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise InputError(
            f"weights: {path} is missing; expected the path of {FILE}, or a hub id such as {weights_files.RRG_SCORERS}"
        )
    return path


def _checked_weights(path: Path, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of the published file, with exactly the expected names and shapes."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(
            f"weights: {path} is not a whole PyTorch file of tensors ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:160]}); download it again"
        ) from error
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        keys = list(content)[:5] if isinstance(content, dict) else None
        held = type(content).__name__ if keys is None else f"the keys {', '.join(map(str, keys))}"
        raise InputError(f"weights: {path} holds {held}; CheXbert's file holds tensors under 'model_state_dict'")
    found = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    # Without the prefix it is no name of this file.
    odd = [name for name in state if not name.startswith(PREFIX)]
    positions = found.pop(POSITION_IDS, None)
    if positions is not None and not torch.equal(positions.flatten(), torch.arange(positions.numel())):
        odd.append(PREFIX + POSITION_IDS)
    missing = [PREFIX + name for name in expected if name not in found]
    odd += [PREFIX + name for name in found if name not in expected]
    if missing or odd:
        raise InputError(
            f"weights: {path} is not CheXbert's: {_listed('missing', missing)}{' and ' if missing and odd else ''}"
            f"{_listed('unexpected', odd)}"
        )
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise InputError(
                f"weights: {path} is of another size: {PREFIX}{name} is {tuple(found[name].shape)}, CheXbert's is "
                f"{tuple(value.shape)}"
            )
    return found


def _listed(kind: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{kind} {', '.join(names[:3])}{more}" if names else ""


def _tokenizer(name: str, vocabulary: int):
    from transformers import BertTokenizer

    try:
        tokenizer = BertTokenizer.from_pretrained(name)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            # What transformers makes of a folder without a vocabulary, or of a hub that it cannot reach.
            raise OSError("no vocab.txt or tokenizer.json was found")
    except Exception as error:  # the hub's client, the file system and the parser raise their own
        raise InputError(
            f"tokenizer: {name!r} cannot be loaded ({' '.join(str(error).split())[:200]}); CheXbert reads the word "
            "pieces of bert-base-uncased: name its hub id, or a folder with its vocab.txt"
        ) from error
    if len(tokenizer) != vocabulary:
        raise InputError(
            f"tokenizer: {name!r} has {len(tokenizer)} word pieces, CheXbert's bert-base-uncased {vocabulary}; name "
            "that tokenizer"
        )
    return tokenizer
