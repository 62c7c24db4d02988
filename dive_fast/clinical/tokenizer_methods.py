"""Two tokenizer methods of transformers 4 that radgraph 0.1.18 calls and transformers 5 no longer has."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dive_fast.errors import InputError

_LOCK = threading.RLock()


def _encode_plus(self, *texts, **options):
    return self(*texts, **options)


def _build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
    if token_ids_1 is not None or self.cls_token_id is None or self.sep_token_id is None:
        raise InputError(
            "weights: expected a tokenizer with [CLS] and [SEP] around one sequence, as BERT's, got "
            f"{type(self).__name__}"
        )
    return [self.cls_token_id, *token_ids_0, self.sep_token_id]


METHODS = {
    "encode_plus": _encode_plus,
    "build_inputs_with_special_tokens": _build_inputs_with_special_tokens,
}


@contextmanager
def tokenizer_methods() -> Iterator[None]:
    """Tokenizers have both methods inside the block, and are as they were after it, also when it raises.

    One thread at a time: a second one waits, so that no thread takes away what another still uses. A method that
    transformers has (4, or a later one that brings it back) stays its own.
    """
    from transformers import PreTrainedTokenizerBase

    with _LOCK:
        added = [name for name in METHODS if not hasattr(PreTrainedTokenizerBase, name)]
        try:
            for name in added:
                setattr(PreTrainedTokenizerBase, name, METHODS[name])
            yield
        finally:
            for name in added:
                if name in vars(PreTrainedTokenizerBase):
                    delattr(PreTrainedTokenizerBase, name)
