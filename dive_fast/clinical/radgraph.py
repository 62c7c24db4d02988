"""RadGraph's entities and relations of reports (Jain et al., NeurIPS 2021; XL: Delbrouck et al., ACL 2024).

The model is that of the `radgraph` package (0.1.18), which also cuts the reports into words; batches, the cache and the
places of entities in the text are ours. An annotation is a dict in the package's published form, two keys added::

    {"entities": {"1": {"tokens": "effusion", "label": "Observation::definitely present", "start_ix": 3, "end_ix": 3,
                        "relations": [["located_at", "2"]], "start": 17, "end": 25}, ...}}

`start_ix`, `end_ix` are the first and last word, relations name other entities by key, and `text[start:end]` is the
entity in the report as it was given (`tokens` are its words joined by blanks).
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from dive_fast.clinical import weights as weights_files
from dive_fast.clinical.annotation_store import AnnotationStore
from dive_fast.clinical.settings import check_common
from dive_fast.clinical.tokenizer_methods import tokenizer_methods
from dive_fast.devices import torch_device
from dive_fast.errors import InputError

MODEL_TYPES = ("radgraph", "radgraph-xl", "modern-radgraph-xl", "echograph")
FILES = ("config.json", "vocabulary", "weights.th")
INSTALL = "pip install 'dive_fast[clinical]'"

# A batch of n reports of L words scores n (L / 2)^2 pairs of spans with 4668 features each, three times
# over: 65536 = n L^2 is about 1 GB (16 reports of 64 words).
WORDS_SQUARED_PER_BATCH = 2**16

# Of the XL types, which the package replaces before it cuts words; each keeps its length, so places stay true.
_REPLACED = (("\\n", "  "), ("\\f", "  "), ("\\u2122", "      "), ("\n", " "), ('\\"', "``"))

Annotation = dict
Annotator = Callable[[Sequence[str]], list[Annotation]]


@dataclass(frozen=True)
class RadGraphSettings:
    """Options of the metric `radgraph` and of the tagger `radgraph`.

    Args:
        weights: a hub id with `<model_type>.tar.gz`, or a folder ROOT with
            ROOT/<model_type>/{config.json, vocabulary/, weights.th}. The encoder that config.json names as
            `model_name` may itself be a hub id or a folder.
        model_type: "radgraph" (the first version, behind most published numbers), "radgraph-xl", "modern-radgraph-xl"
            or "echograph".
        cache: a file that keeps annotations from run to run; None: in memory. It holds words of the reports.
        device: "cpu", "cuda", "cuda:1"; None: a GPU where there is one.
        batch_size: most reports at a time; those of one length share a batch, and fewer where they are long.
        annotator: another `texts -> annotations` in place of RadGraph's model; then the other options do not apply.

    Raises:
        InputError: an option of the wrong type or out of range.
    """

    weights: str = weights_files.RRG_SCORERS
    model_type: str = "radgraph"
    cache: str | None = None
    device: str | None = None
    batch_size: int = 16
    annotator: Annotator | None = None

    def __post_init__(self):
        check_common(self.weights, self.device, self.batch_size)
        if self.model_type not in MODEL_TYPES:
            raise InputError(f"model_type: expected one of {', '.join(MODEL_TYPES)}, got {self.model_type!r}")
        if self.cache is not None and not isinstance(self.cache, str | Path):
            raise InputError(f"cache: expected a file name, got {self.cache!r}")
        if self.annotator is not None and not callable(self.annotator):
            raise InputError(f"annotator: expected a callable texts -> annotations, got {self.annotator!r}")

    def build(self) -> Annotator:
        """The annotator; its model is loaded when a text is not in the cache.

        Raises:
            InputError: radgraph is not installed, or the weights are not there.
        """
        return self.annotator or RadGraphAnnotator(self)

    def loaded(self) -> "RadGraphSettings":
        """The same with an annotator that all calls share, so that its model and what it has read stay in memory."""
        return replace(self, annotator=self.build())


class RadGraphAnnotator:
    """Callable `texts -> annotations`, one for each text; a text without words has no entities and meets no model.

    Attributes:
        fingerprint: sha256 of the weights' folder; part of every key of the cache.

    Raises:
        InputError: radgraph is not installed, files are missing or do not fit each other, no such device.
    """

    def __init__(self, settings: RadGraphSettings | None = None):
        self.settings = settings or RadGraphSettings()
        _radgraph()
        self.folder = _folder(self.settings.weights, self.settings.model_type)
        self.device = torch_device(self.settings.device)
        self.fingerprint = weights_files.fingerprint(
            [
                *(self.folder / name for name in ("config.json", "weights.th")),
                *(path for path in sorted((self.folder / "vocabulary").iterdir()) if path.suffix == ".txt"),
                *_tokenizer_files(_encoder(self.folder)),
            ]
        )
        self.store = AnnotationStore(self.settings.cache)
        self._model = None

    def __call__(self, texts: Sequence[str]) -> list[Annotation]:
        keys = [self._key(text) for text in texts]
        uncached = [text for key, text in dict(zip(keys, texts, strict=True)).items() if key not in self.store]
        words = self._words(uncached)
        for rows in self._batches(words):
            found = self._annotate([uncached[row] for row in rows], [words[row] for row in rows])
            for row, one in zip(rows, found, strict=True):
                self.store[self._key(uncached[row])] = one
        # What has no words is in no batch, and so not in the store.
        return [self.store[key] if key in self.store else {"entities": {}} for key in keys]

    def _key(self, text: str) -> str:
        return hashlib.sha256(f"{self.fingerprint}\n{text}".encode(errors="surrogatepass")).hexdigest()

    def _words(self, texts: list[str]) -> list[list[str]]:
        return [row["sentences"][0] for row in _radgraph().preprocess_reports(texts, self.settings.model_type)]

    def _batches(self, words: Sequence[Sequence[str]]) -> Iterable[list[int]]:
        """Rows with words, in batches of the same number of words, within `batch_size` and WORDS_SQUARED_PER_BATCH.

        The same number, because the package fills up the shorter reports' candidates for relations with one span more
        than once and does not leave those rows out: padded reports would gain relations.
        """
        rows_of = {}
        for row, one in enumerate(words):
            rows_of.setdefault(len(one), []).append(row)
        rows_of.pop(0, None)
        for length, rows in sorted(rows_of.items()):
            size = max(1, min(self.settings.batch_size, WORDS_SQUARED_PER_BATCH // length**2))
            yield from (rows[start : start + size] for start in range(0, len(rows), size))

    def _annotate(self, texts: Sequence[str], sentences: Sequence[Sequence[str]]) -> list[Annotation]:
        """One pass of the model: the texts are the sentences of one document, which the model treats one by one."""
        import torch

        package = _radgraph()
        kind = self.settings.model_type
        with _as_radgraph_expects(package):
            if self._model is None:
                self._model = _load(package, self.folder, kind, self.device)
            network = self._model.model
            data = package.AllennlpDataset(
                [self._model.reader.text_to_instance({"doc_key": "0", "sentences": sentences, "dataset": kind})]
            )
            data.index_with(network.vocab)
            (batch,) = package.PyTorchDataLoader(dataset=data, batch_size=1)
            with torch.inference_mode():
                output = network(**package.batch_to_device(batch, self.device))
            document = network.make_output_human_readable(output)
        return [
            annotation(
                text,
                words,
                [(*entity.span.span_sent, entity.label) for entity in sentence.predicted_ner],
                [(*(span.span_sent for span in found.pair), found.label) for found in sentence.predicted_relations],
                replaced=kind != "radgraph",
            )
            for text, words, sentence in zip(texts, sentences, document, strict=True)
        ]


def annotation(
    text: str,
    words: Sequence[str],
    entities: Sequence[tuple[int, int, str]],
    relations: Sequence[tuple[tuple[int, int], tuple[int, int], str]],
    *,
    replaced: bool = False,
) -> Annotation:
    """An annotation from spans of words; a relation whose object is no entity is dropped, as the package does."""
    places = word_places(text, words, replaced=replaced)
    keys = {(first, last): str(number) for number, (first, last, _) in enumerate(entities, start=1)}
    return {
        "entities": {
            keys[first, last]: {
                "tokens": " ".join(words[first : last + 1]),
                "label": label,
                "start_ix": first,
                "end_ix": last,
                "relations": [[kind, keys[o]] for s, o, kind in relations if s == (first, last) and o in keys],
                "start": places[first][0],
                "end": places[last][1],
            }
            for first, last, label in entities
        }
    }


def word_places(text: str, words: Sequence[str], *, replaced: bool = False) -> list[tuple[int, int]]:
    """(start, end) of the package's words in `text`; its words are the text's characters without the white space.

    Args:
        replaced: whether the package's replacements for the XL types come first.
    """
    if replaced:
        for written, read in _REPLACED:
            text = text.replace(written, read)
    places, end = [], 0
    for word in words:
        start = text.index(word, end)
        end = start + len(word)
        places.append((start, end))
    return places


def _radgraph():
    """The parts of the radgraph package that are used, as one namespace.

    Raises:
        InputError: it, or a package that it needs, is not installed.
    """
    from types import SimpleNamespace

    try:
        with warnings.catch_warnings():  # importing it resets the process's filter for DeprecationWarning
            import radgraph.radgraph as module
            from radgraph.allennlp.data.dataloader import PyTorchDataLoader
            from radgraph.allennlp.data.dataset_readers import AllennlpDataset
            from radgraph.utils import batch_to_device, preprocess_reports
    except ImportError as error:
        raise InputError(
            f"radgraph: the metric and the tagger of this name run the radgraph package, which cannot be imported "
            f"({error}); install it with `{INSTALL}`"
        ) from error
    return SimpleNamespace(
        module=module,
        PyTorchDataLoader=PyTorchDataLoader,
        AllennlpDataset=AllennlpDataset,
        batch_to_device=batch_to_device,
        preprocess_reports=preprocess_reports,
    )


@contextmanager
def _as_radgraph_expects(package):
    """transformers 4's tokenizer methods, and no traces.

    The package prints its device and warns of one-word reports; its initial values and data loader draw random numbers,
    which a training run around it must not miss.
    """
    import torch

    with tokenizer_methods(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        package.module.print = lambda *args, **options: None
        try:
            yield
        finally:
            del package.module.print


def _folder(weights: str, model_type: str) -> Path:
    """The folder with FILES, downloaded if need be."""
    if weights_files.is_hub_id(weights):
        archive = weights_files.download(weights, f"{model_type}.tar.gz")
        folder = weights_files.unpacked(archive, model_type)
    else:
        folder = Path(weights).expanduser() / model_type
    labels = [f"vocabulary/{model_type}__{kind}_labels.txt" for kind in ("ner", "relation")]
    missing = [name for name in (*FILES, *labels) if not (folder / name).exists()]
    if missing:
        raise InputError(
            f"weights: {folder / missing[0]} is missing; expected the folder ROOT that holds "
            f"ROOT/{model_type}/{{{', '.join(FILES)}}}, or a hub id such as {weights_files.RRG_SCORERS}"
        )
    return folder


def _encoder(folder: Path) -> str:
    """The encoder that config.json names."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        encoder = config["model"]["embedder"]["token_embedders"]["bert"]["model_name"]
        if not isinstance(encoder, str):
            raise TypeError(f"model_name is {encoder!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"weights: {file} is not a configuration of RadGraph ({type(error).__name__}: {error}); unpack the archive "
            "again"
        ) from error
    return encoder


def _tokenizer_files(encoder: str) -> list[Path]:
    """What decides how words are cut into pieces, where the encoder is a local folder."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
    return [Path(encoder) / name for name in names if (Path(encoder) / name).is_file()]


def _load(package, folder: Path, model_type: str, device):
    """The package's model with its weights, strictly; built on the CPU, so that the weights' own device is no matter.

    The package reads weights with `torch.load(weights_only=True)` there.
    """
    try:
        model = package.module.RadGraph(model_type=model_type, model_cache_dir=str(folder.parent), cuda=-1)
    except Exception as error:  # whatever a foreign file makes torch, transformers or the package raise
        raise InputError(
            f"weights: {folder} cannot be loaded as {model_type} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}); weights.th, vocabulary and config.json must be of one archive, "
            "and its model_name a hub id that can be reached or a local folder"
        ) from error
    model.model.to(device)
    model.device = device
    return model
