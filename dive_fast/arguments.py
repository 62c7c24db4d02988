"""The training arguments: transformers' own, with other defaults and with their ranges checked."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainingArguments

from dive_fast import sharding
from dive_fast.errors import InputError

LOWEST = {
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "adam_epsilon": 0,
    "warmup_steps": 0,
    "prompt_cache_bytes": 0,
    "eval_reports": 0,
    "eval_max_new_tokens": 1,
    "seed": 0,
    "dataloader_num_workers": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "save_total_limit": 1,
}
"""The least value of training arguments that transformers itself takes in any size."""


@dataclass
class DiveTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with defaults for adapters of a few hundred thousand parameters."""

    learning_rate: float = field(default=3e-3, metadata={"help": "peak learning rate of AdamW"})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "reports per device and micro-batch"})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "reports per device in evaluation"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the data; max_steps takes precedence"})
    logging_steps: float = field(default=10, metadata={"help": "log the loss every so many steps"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints kept"})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "trackers to report to"})
    prompt_cache_bytes: int = field(
        default=0, metadata={"help": "host memory for the prompts' caches from epoch to epoch (scope 'response')"}
    )
    selective_checkpointing: bool = field(
        default=False, metadata={"help": "compute all but products and attention again in the backward pass"}
    )
    eval_reports: int = field(
        default=0, metadata={"help": "write and score so many held-out reports at every evaluation; 0: none"}
    )
    eval_max_new_tokens: int = field(default=256, metadata={"help": "length limit of the reports of eval_reports"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "records are not columns; keep False"})

    fsdp: bool | str | None = field(
        default=None, metadata={"help": "share the decoder's frozen layers among the processes (FSDP2)"}
    )
    fsdp_config: dict | str | None = field(
        default=None, metadata={"help": "version (2), reshard_after_forward (free a layer behind its pass)"}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "every adapter parameter takes part in every step"}
    )

    def __post_init__(self):
        if not torch.accelerator.is_available():
            # Unsaid, processes started together on a CPU would train one copy of the model each, side by side.
            self.use_cpu = True
            self.dataloader_pin_memory = False
        super().__post_init__()
        _check_ranges(self)


def training_arguments(
    args: Mapping | TrainingArguments | None, output_dir: Path, *, spread: bool = False
) -> TrainingArguments:
    """`args` as an object, checked, with the output folder.

    Args:
        spread: one process uses several GPUs, over which the model is spread.

    Raises:
        InputError: an unknown name (with the nearest), a value of the wrong type or out of range, several visible GPUs.
    """
    if args is not None and not isinstance(args, TrainingArguments | Mapping):
        raise InputError(f"args: expected DiveTrainingArguments or a dict of them, got {type(args).__name__}")
    if isinstance(args, TrainingArguments):
        arguments = dataclasses.replace(args, output_dir=str(output_dir))
        _check_ranges(arguments)
    else:
        types = {f.name: f.type for f in dataclasses.fields(DiveTrainingArguments)}
        for name, value in (args or {}).items():
            if name not in types:
                near = difflib.get_close_matches(str(name), types, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise InputError(f"args: there is no training argument {name!r}{hint}")
            if types[name] in (int, float) and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise InputError(f"args: {name} is a number, got {value!r}")
            if types[name] is int and not isinstance(value, int):
                raise InputError(f"args: {name}: expected a whole number, got {value!r}")
            if types[name] is bool and not isinstance(value, bool):
                raise InputError(f"args: {name}: expected True or False, got {value!r}")
        try:
            arguments = DiveTrainingArguments(**{**(args or {}), "output_dir": str(output_dir)})
        except (ValueError, TypeError, ImportError) as error:
            raise InputError(f"args: {error}") from error
    if arguments.fsdp:
        sharding.take_over(arguments)
    if arguments.n_gpu > 1 and not spread:
        raise InputError(
            f"args: {arguments.n_gpu} GPUs are visible to one process; start one process per GPU with "
            "`torchrun --nproc-per-node N` or `accelerate launch`, show it one with CUDA_VISIBLE_DEVICES=0, or give it "
            "a model that was loaded over all of them with device_map='auto'"
        )
    return arguments


def _check_ranges(arguments: TrainingArguments) -> None:
    if arguments.label_smoothing_factor:
        raise InputError("label_smoothing_factor: this loss weighs tokens and has no smoothing; leave it at 0")
    if arguments.resume_from_checkpoint is not None:
        raise InputError(
            "resume_from_checkpoint: a run goes on with resume=True (--resume), from the newest whole checkpoint in "
            "its own folder; leave it out"
        )
    if getattr(arguments, "selective_checkpointing", False) and arguments.gradient_checkpointing:
        raise InputError(
            "selective_checkpointing: not together with gradient_checkpointing, which keeps less and costs more"
        )
    for name, least in LOWEST.items():
        value = getattr(arguments, name, None)  # transformers' own arguments lack ours
        if value is not None and not least <= value < math.inf:
            raise InputError(f"{name}: expected a number >= {least}, got {value}")
        if (least == 1 or name == "eval_reports") and value is not None and not isinstance(value, int):
            raise InputError(f"{name}: expected a whole number, got {value}")
    if arguments.seed >= 2**32:
        raise InputError(f"seed: expected a whole number below 2**32, got {arguments.seed}")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(arguments, name) < 1:
            raise InputError(f"{name}: expected a number in [0, 1), got {getattr(arguments, name)}")
    if arguments.max_steps < 1 and arguments.max_steps != -1:
        raise InputError(f"max_steps: expected >= 1, or -1 to go by num_train_epochs, got {arguments.max_steps}")
    for name in ("num_train_epochs", "save_steps", "logging_steps"):
        if not 0 < getattr(arguments, name) < math.inf:
            raise InputError(f"{name}: expected a number > 0, got {getattr(arguments, name)}")
