"""The rows of a predictions file: what is written about every record, wherever it is run."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

from dive_fast.data.record import Record
from dive_fast.decode import generate


def predictions(
    model, processor, records: Sequence[Record], *, batch_size: int, options: Mapping
) -> Iterator[dict[str, str | int]]:
    """Rows with id, prompt, prediction, reference, finish_reason and engine, in the records' order.

    Args:
        batch_size: so many records go through `dive_fast.generate` at a time.
        options: of `dive_fast.generate`. With a `seed`, a record draws from one of its own (`record_seed`). With
            `num_return_sequences` > 1 a record has so many rows, numbered by `sample`.

    Raises:
        InputError: what `dive_fast.generate` refuses.
    """
    samples, seed = options.get("num_return_sequences", 1), options.get("seed")
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        own = {} if seed is None else {"seed": [record_seed(seed, record.id) for record in batch]}
        output = generate(model, batch, processor=processor, **{**options, **own})
        results = [(record, sample) for record in batch for sample in range(samples)]
        for (record, sample), text, reason in zip(results, output.texts, output.finish_reasons, strict=True):
            row = {
                "id": record.id,
                "prompt": record.prompt,
                "prediction": text,
                "reference": record.report,
                "finish_reason": reason,
                "engine": output.stats["engine"],
            }
            yield row | {"sample": sample} if samples > 1 else row


def record_seed(seed: int, record_id: str) -> int:
    """A record's own seed in [0, 2**63), a hash of both: the same in any batch, shard and process."""
    return int.from_bytes(hashlib.sha256(f"{seed} {record_id}".encode()).digest()[:8], "big") >> 1
