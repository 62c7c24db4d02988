"""`dive_fast.train`: from a frozen model and records to a trained adapter, steering or one to compare it with."""

import dataclasses
import hashlib
import json
import logging
import os
import signal
import threading
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import peft
from safetensors import SafetensorError
from torch import nn
from transformers import TrainerCallback, TrainerState, set_seed

from dive_fast import checkpoints
from dive_fast.adapters import SETUP_FILE, adapted, adapter_settings, base_settings, load
from dive_fast.arguments import DiveTrainingArguments, training_arguments
from dive_fast.data import to_records
from dive_fast.data.encoding import ReportEncoder
from dive_fast.data.images import image_key
from dive_fast.data.record import Record
from dive_fast.devices import is_spread
from dive_fast.errors import InputError
from dive_fast.models.backbone import products_are_slow
from dive_fast.models.head import check_head
from dive_fast.models.processors import image_backend
from dive_fast.models.spec import decoder_of, text_config_of
from dive_fast.run_settings import changes, read_settings
from dive_fast.sharding import any_process
from dive_fast.supervision import Supervision, Teacher
from dive_fast.supervision.settings import TAGGERS
from dive_fast.supervision.teacher import TeacherRunner
from dive_fast.trainer import DiveTrainer

__all__ = ["DiveTrainingArguments", "TrainResult", "TrainingInterrupted", "load", "train"]

RESULT_FILE = "dive_result.json"
"""What training measured, beside the adapter."""

logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """Where the adapter lies, what training measured, and its log.

    Attributes:
        adapter_dir: `peft.PeftModel.from_pretrained` and `dive_fast.load` read it.
        metrics: train_loss, train_runtime, seconds_per_step (the mean of the steps that this process made, without
            evaluating and saving) and, with an eval set, eval_loss and eval_perplexity; with `eval_reports` also
            eval_rouge_l, eval_decisive_f1 and eval_terminated (0..1).
        history: one dict per log entry: step, loss, learning_rate, grad_norm; eval entries among them.
        model: the trained PEFT model, in eval mode.
    """

    adapter_dir: Path
    metrics: dict[str, float]
    history: list[dict]
    model: peft.PeftModel = field(repr=False)


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C during training; `saved_to` is the checkpoint that `resume=True` continues from."""

    def __init__(self, saved_to: Path):
        super().__init__(f"interrupted; saved to {saved_to}, continue with resume=True")
        self.saved_to = saved_to


def train(
    model_or_path,
    train_dataset,
    output_dir,
    *,
    processor=None,
    eval_dataset=None,
    steering: peft.PeftConfig | None = None,
    supervision: Supervision | None = None,
    teacher: Teacher | None = None,
    args: Mapping | DiveTrainingArguments | None = None,
    resume: bool = False,
) -> TrainResult:
    """Train a steering adapter, or another PEFT adapter as its baseline, on a frozen model.

    Args:
        model_or_path: a transformers model, a PEFT model with adapters to train on, or a name that
            `dive_fast.models.backbone.load_backbone` takes ("smollm2", a folder, a hub id).
        train_dataset, eval_dataset: records, dicts with `report` and `prompt` (or `indication`), a `datasets.Dataset`,
            or the path of a JSON-lines or CSV file.
        output_dir: receives checkpoints, the final adapter (`adapter_config.json`, `adapter_model.safetensors`) and
            the run's settings.
        processor: the model's processor or fast tokenizer; needed with a model object.
        steering: the adapter; default `DiveConfig()`. Not with a PEFT model, which brings its own. Any other
            `peft.PeftConfig` that adapts layers (LoRA and its kin) trains with the same loss, data order and teacher;
            it sees whole rows, prompts included, since it acts on them too.
        supervision: token weights and loss terms; default `Supervision()`.
        teacher: the model with demonstrations to distil; None: cross-entropy alone.
        args: `DiveTrainingArguments` or a dict of them.
        resume: continue from the newest whole checkpoint in `output_dir`, from the start where there is none.

    Raises:
        InputError: bad data, a bad setting, or an `output_dir` that holds another run; nothing is written then.
        TrainingInterrupted: after Ctrl-C, once the running step is finished and saved.
    """
    settings = {
        "steering": (steering, peft.PeftConfig, "dive_fast.DiveConfig or another peft.PeftConfig"),
        "supervision": (supervision, Supervision, "dive_fast.Supervision"),
        "teacher": (teacher, Teacher, "dive_fast.Teacher"),
    }
    for name, (value, cls, expected) in settings.items():
        if value is not None and not isinstance(value, cls):
            raise InputError(f"{name}: expected a {expected}, got {type(value).__name__}")
    if not isinstance(output_dir, str | os.PathLike) or not os.fspath(output_dir):
        raise InputError(f"output_dir: expected the folder to write to, got {output_dir!r}")
    output_dir = Path(output_dir)
    records = to_records(train_dataset, "train_dataset")
    eval_records = None if eval_dataset is None else to_records(eval_dataset, "eval_dataset")
    supervision = supervision or Supervision()
    if teacher is None and supervision.needs_disagreement:
        raise InputError("tagger: 'disagreement' compares teacher and zero-shot model; give a teacher")
    arguments = training_arguments(args, output_dir, spread=is_spread(model_or_path))
    if eval_records is None and arguments.eval_strategy != "no":
        raise InputError("args: eval_strategy evaluates on held-out records; give an eval_dataset")
    in_a_batch = arguments.train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and len(records) < in_a_batch:
        raise InputError(
            f"args: dataloader_drop_last leaves nothing of {len(records)} records, of which {in_a_batch} make a batch; "
            "leave it out, or lower per_device_train_batch_size"
        )
    set_seed(arguments.seed)
    # The first process fills the tagger's cache, the others find it filled.
    with arguments.main_process_first(desc="tagging"):
        supervision.read_ahead(record.report for record in (*records, *(eval_records or ())))
    model, processor = adapted(model_or_path, processor, steering)
    try:
        return _train(
            model, processor, records, eval_records, output_dir, supervision, teacher, arguments, resume=resume
        )
    except BaseException:
        given = isinstance(model_or_path, nn.Module) and not isinstance(model_or_path, peft.PeftModel)
        if given and not arguments.fsdp:
            # The caller's model as it was, for another attempt.
            _take_off(model.get_base_model(), arguments)
            model.unload()
        raise


def _train(
    model: peft.PeftModel,
    processor,
    records: list[Record],
    eval_records: list[Record] | None,
    output_dir: Path,
    supervision: Supervision,
    teacher: Teacher | None,
    arguments: DiveTrainingArguments,
    *,
    resume: bool,
) -> TrainResult:
    """`train` with everything read and the adapter in its place."""
    base = model.get_base_model()
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(
            "model: some of its weights are offloaded (device_map), and no gradient passes through those; load it "
            "whole, or share it among processes with fsdp"
        )
    if arguments.should_log and products_are_slow(base.dtype, arguments.device):
        logger.warning(
            "model: this processor multiplies bfloat16 more slowly than float32; training is faster with the weights "
            "in float32 (dtype), which take twice the memory"
        )
    encoder = ReportEncoder(processor, context_length=text_config_of(base).max_position_embeddings)
    encoder.check_lengths([*records, *(eval_records or ())])
    check_head(base)
    runner = None
    if teacher is not None:
        pool = teacher.demonstration_pool(records)
        pool.check(records)
        runner = TeacherRunner(
            model,
            encoder,
            pool,
            cache_dir=teacher.cache_dir,
            memory_bytes=teacher.memory_bytes,
            layers=supervision.align_weight > 0,
            disagreement=supervision.needs_disagreement,
        )
    setup = _setup(model, processor, records, supervision, teacher, runner, arguments)
    new = not output_dir.exists()
    checkpoint = _prepare_output(output_dir, setup, resume)
    try:
        try:
            trainer = DiveTrainer(
                model,
                arguments,
                train_records=records,
                eval_records=eval_records,
                encoder=encoder,
                supervision=supervision,
                teacher=runner,
                callbacks=[_StopOnInterrupt()],
            )
        except (RuntimeError, ValueError) as error:  # a tracker of report_to that is not installed, or not known
            raise InputError(f"args: {error}") from error
        if arguments.should_save:
            with _writing(output_dir):
                checkpoints.write_json(output_dir / SETUP_FILE, setup)
        return _run(trainer, output_dir, checkpoint)
    except BaseException as stop:
        last = checkpoints.newest_complete(output_dir) if type(stop) is KeyboardInterrupt else None
        if last is not None:  # stopped at once, by a second Ctrl-C
            raise TrainingInterrupted(last) from None
        if arguments.should_save and not _holds_run(output_dir):
            # Nothing was learned: settings alone would only stand in the way of the next attempt.
            (output_dir / SETUP_FILE).unlink(missing_ok=True)
            if new:
                with suppress(OSError):  # the caller may have put something there
                    output_dir.rmdir()
        raise


def _setup(model, processor, records, supervision: Supervision, teacher: Teacher | None, runner, arguments) -> dict:
    """What two runs must share for one to continue the other."""
    digest = hashlib.sha256()
    for record in records:
        images = [image_key(image) for image in record.images]
        digest.update(json.dumps([record.id, record.prompt, record.report, images]).encode())
    tagger = supervision.tagger
    named = {field.name: getattr(supervision, field.name) for field in dataclasses.fields(supervision)}
    named["tagger"] = tagger if isinstance(tagger, str) else getattr(tagger, "__qualname__", type(tagger).__name__)
    if isinstance(tagger, str) and tagger not in TAGGERS:
        named["tagger"] = "a lexicon's file"
    # What the lexicon or the weights say, not where they lie here or what they run on.
    del named["tagger_options"]
    named["tagger_fingerprint"] = supervision.tagger_fingerprint
    kept = ("seed", "data_seed", "learning_rate", "lr_scheduler_type", "max_steps", "num_train_epochs", "weight_decay")
    kept += ("warmup_steps", "gradient_accumulation_steps", "max_grad_norm", "optim", "bf16", "fp16")
    resized_by = image_backend(processor)
    return {
        "model": base_settings(model.get_base_model()),
        **({} if resized_by is None else {"images": resized_by}),
        "steering": adapter_settings(model.active_peft_config),
        "supervision": named,
        "teacher": None
        if teacher is None
        else {"shots": teacher.shots, "demos": teacher.demos, "seed": teacher.seed, "pool": runner.pool.fingerprint},
        "data": {"records": len(records), "sha256": digest.hexdigest()},
        "training": {name: _plain(getattr(arguments, name, None)) for name in kept}
        | {"batch_size": arguments.per_device_train_batch_size * arguments.world_size},
    }


def _plain(value):
    return getattr(value, "value", value)


def _prepare_output(output_dir: Path, setup: dict, resume: bool) -> Path | None:
    """Refuse to mix runs; returns the checkpoint to resume from."""
    file = output_dir / SETUP_FILE
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"output_dir: {output_dir} is a file; name a folder")
    if resume and file.is_file():
        changed = changes(read_settings(file, "resume", "name another output_dir"), setup)
        if changed:
            raise InputError(
                f"resume: the run in {output_dir} had other settings ({changed}); give the same ones, or another "
                "output_dir"
            )
        return _newest(output_dir)
    if _holds_run(output_dir):
        raise InputError(f"output_dir: {output_dir} holds another run; pass resume=True or another folder")
    with _writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(output_dir, os.W_OK):
            raise PermissionError("no permission to write")
    return None


def _newest(output_dir: Path) -> Path | None:
    """The checkpoint to go on from; says which ones are passed over for it."""
    found = checkpoints.newest_complete(output_dir)
    for folder in reversed(checkpoints.checkpoints(output_dir)):
        if folder == found:
            break
        logger.warning("resume: %s is cut short or damaged; it is passed over", folder)
    return found


@contextmanager
def _writing(output_dir: Path):
    """What goes wrong in writing there, as an InputError that says what is still whole."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        last = checkpoints.newest_complete(output_dir) if output_dir.is_dir() else None
        kept = f"; {last} is whole and can be resumed from" if last else ""
        raise InputError(
            f"output_dir: {output_dir} cannot be written ({error}){kept}; free disk space or name another"
        ) from error


def _holds_run(output_dir: Path) -> bool:
    return bool(checkpoints.checkpoints(output_dir)) or (output_dir / "adapter_model.safetensors").exists()


def _run(trainer: DiveTrainer, output_dir: Path, checkpoint: Path | None) -> TrainResult:
    finished = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if finished is not None and finished.global_step >= finished.max_steps:
        # The run has made its last step: the Trainer would take one step more.
        best = finished.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        trainer._load_from_checkpoint(str(checkpoint if best is None else output_dir / Path(best).name))
        trainer.state = finished
        metrics = _metrics_of(output_dir)
    else:
        with _deferred_interrupt():
            outcome = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if _stopping.is_set():
            raise TrainingInterrupted(checkpoints.newest_complete(output_dir))
        metrics = dict(outcome.metrics)
        if trainer.step_timer.steps:
            metrics["seconds_per_step"] = trainer.step_timer.seconds / trainer.step_timer.steps
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    model = _as_loaded(trainer)
    if trainer.args.should_save:
        log = {"metrics": metrics, "history": trainer.state.log_history}
        with _writing(output_dir):
            checkpoints.save_adapter(model, output_dir)
            checkpoints.write_json(output_dir / RESULT_FILE, log)
    trainer.accelerator.wait_for_everyone()
    return TrainResult(output_dir, metrics, list(trainer.state.log_history), model)


def _metrics_of(output_dir: Path) -> dict:
    """What a run that has ended has measured; empty for one that was cut off before it wrote that down."""
    try:
        return dict(json.loads((output_dir / RESULT_FILE).read_text(encoding="utf-8"))["metrics"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _as_loaded(trainer: DiveTrainer) -> peft.PeftModel:
    """The model as `load` gives it, without what training put around its forward passes."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    _take_off(model.get_base_model(), trainer.args)
    return model


def _take_off(base: nn.Module, arguments) -> None:
    """Undo what the arguments have training put around a model's forward passes."""
    if arguments.gradient_checkpointing or getattr(arguments, "selective_checkpointing", False):
        base.gradient_checkpointing_disable()
        # The hooks that let gradients begin at the embedding; the decoding engine would refuse to pass them by.
        base.disable_input_require_grads()
    if arguments.torch_compile:
        for layer in decoder_of(base).layers:
            layer._compiled_call_impl = None


_interrupted = threading.Event()
"""This process has met Ctrl-C."""
_stopping = threading.Event()
"""The step that has just ended is the last, because a process has met Ctrl-C."""


@contextmanager
def _deferred_interrupt():
    """Ctrl-C asks the running step to be the last; a second one stops at once."""
    _interrupted.clear()
    _stopping.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(signum, frame):
        if _interrupted.is_set():
            raise KeyboardInterrupt
        _interrupted.set()

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _StopOnInterrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if any_process(_interrupted.is_set(), args):
            # All stop behind the same step: one that went on would wait for the others for ever.
            _stopping.set()
            control.should_save = True
            control.should_training_stop = True
        return control
