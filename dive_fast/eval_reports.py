"""Reports that are written and scored while a run evaluates: likelihood alone does not say how a report reads."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from accelerate.utils import gather_object

from dive_fast.arguments import DiveTrainingArguments
from dive_fast.data.encoding import ReportEncoder
from dive_fast.data.record import Record
from dive_fast.decode import generate
from dive_fast.errors import InputError
from dive_fast.evaluate import evaluate
from dive_fast.metrics.peers import pycocoevalcap
from dive_fast.supervision.tagger import Tagger

# Name in the log -> name in `evaluate`'s scores.
SCORES = {"rouge_l": "rouge_l", "decisive_f1": "decisive_f1", "terminated": "eos_rate"}

logger = logging.getLogger(__name__)


def check(records: Sequence[Record] | None, encoder: ReportEncoder, arguments: DiveTrainingArguments) -> None:
    """What would fail at the first evaluation fails before the first step.

    Raises:
        InputError: no held-out records, no pycocoevalcap, or a prompt that leaves no room for the new tokens.
    """
    if not records:
        raise InputError("eval_reports: reports are written for held-out records; give an eval_dataset")
    pycocoevalcap("rouge.rouge")
    for record in records[: arguments.eval_reports]:
        length = encoder.prompts([record])["input_ids"].shape[1]
        if encoder.context_length is not None and length + arguments.eval_max_new_tokens > encoder.context_length:
            raise InputError(
                f"eval_max_new_tokens: the prompt of record {record.id!r} has {length} tokens and the model's context "
                f"{encoder.context_length}, so {arguments.eval_max_new_tokens} new ones do not fit; lower it"
            )


def write_and_score(
    model,
    records: Sequence[Record],
    encoder: ReportEncoder,
    arguments: DiveTrainingArguments,
    tagger: Tagger | None = None,
    together: AbstractContextManager | None = None,
) -> dict[str, float]:
    """Greedy reports for the first `eval_reports` records, scored: rouge_l, decisive_f1 and the share that ends by EOS.

    `tagger` marks what is decisive, in the reports as in the references; None is the chest lexicon.
    Under data parallelism every process writes its share, within `together`, and all of them get the scores of the
    whole.
    """
    records = records[: arguments.eval_reports]
    mine = range(arguments.process_index, len(records), arguments.world_size)
    written = []
    with together or nullcontext():
        output = mine and generate(
            model,
            [records[i] for i in mine],
            processor=encoder.processor,
            max_new_tokens=arguments.eval_max_new_tokens,
            batch_size=arguments.per_device_eval_batch_size,
        )
    if mine:
        engine, reason = output.stats["engine"], output.stats.get("not_native")
        logger.info("eval_reports: written by the engine %s%s", engine, f" ({reason})" if reason else "")
        written = list(zip(mine, output.texts, output.finish_reasons, strict=True))
    if arguments.world_size > 1:
        written = sorted(gather_object(written))
    scores = evaluate(
        [text for _, text, _ in written],
        [record.report for record in records],
        metrics=("rouge_l", "decisive"),
        tagger=tagger,
        finish_reasons=[reason for _, _, reason in written],
        ids=[record.id for record in records],
        bootstrap=0,
    )
    return {name: scores[key] for name, key in SCORES.items()}
