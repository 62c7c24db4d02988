"""transformers' Trainer with the decisive-token loss, a teacher, checkpoints that are whole, and exact accumulation.

N response tokens of a batch, D hidden size, L layers.
"""

import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback

from dive_fast import checkpoints, eval_reports, ops, sharding
from dive_fast.data.collator import IGNORED, ReportCollator
from dive_fast.data.encoding import ReportEncoder
from dive_fast.data.record import Record
from dive_fast.devices import sum_dtype
from dive_fast.errors import InputError
from dive_fast.likelihood import batch_nll, batch_states
from dive_fast.models.head import head_of
from dive_fast.models.prefix import can_run_prefixes
from dive_fast.models.recomputation import checkpoint_selectively
from dive_fast.models.spec import decoder_of
from dive_fast.prompt_store import PromptStore
from dive_fast.supervision.settings import Supervision
from dive_fast.supervision.teacher import TeacherRunner, TeacherTargets, disagreement_weights


class DiveTrainer(Trainer):
    """Trains the adapters of a PEFT model, steering or others, on records.

    Losses are sums over the tokens of the whole step divided by that step's totals, so neither gradient accumulation
    nor the number of processes changes a step.
    """

    def __init__(
        self,
        model,
        args,
        *,
        train_records: Sequence[Record],
        eval_records: Sequence[Record] | None,
        encoder: ReportEncoder,
        supervision: Supervision,
        teacher: TeacherRunner | None,
        **options,
    ):
        if getattr(args, "eval_reports", 0):
            eval_reports.check(eval_records, encoder, args)
        names = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
        compilation = {name: getattr(args, name) for name in names}
        for name in names:  # layers are compiled below, not the model as a whole
            setattr(args, name, None)
        if args.fsdp:
            sharding.shard_layers(model, args)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_records,
            eval_dataset=eval_records,
            data_collator=ReportCollator(encoder, supervision.weigher(), split=_runs_prompts_alone(model)),
            **options,
        )
        for name, value in compilation.items():
            setattr(args, name, value)
        if self.is_fsdp_enabled:
            raise InputError(
                "fsdp: accelerate was told to shard the model its own way, with which adapters cannot be saved; launch "
                "without FSDP in its configuration, and give the training argument fsdp=True"
            )
        if args.torch_compile:
            # All layers share one graph. The model around them is left alone: its passes come in two forms, with hooks
            # that are there for one pass only.
            for layer in decoder_of(model.get_base_model()).layers:
                layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        if getattr(args, "selective_checkpointing", False):
            checkpoint_selectively(model.get_base_model())
        # Both say that compute_loss has normalised over the whole step already (the first for older releases).
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.encoder = encoder
        self.supervision = supervision
        self.teacher = teacher
        self.head = head_of(model.get_base_model())
        self.prompt_store = PromptStore(getattr(args, "prompt_cache_bytes", 0))
        self.step_timer = StepTimer()
        self.add_callback(self.step_timer)

    # -- the loss ----------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one step and their totals: (sum of token weights, number of response tokens)."""
        self.step_timer.start()
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        dtype = sum_dtype(device)
        weights = sum(batch["target_weights"].to(dtype).sum() for batch in batches)
        tokens = sum(len(batch["predictors"]) for batch in batches)
        if self.supervision.needs_disagreement:
            lengths = (n for batch in batches for n in (batch["targets"] != IGNORED).sum(dim=1).tolist())
            fraction, weight = self.supervision.disagreement_fraction, self.supervision.pathology_weight
            weights = weights + sum(
                float(disagreement_weights(torch.zeros(n), fraction, weight).sum()) for n in lengths
            )
        totals = torch.stack([weights.to(device), torch.full((), tokens, dtype=dtype, device=device)])
        if self.args.world_size > 1:
            totals = self.accelerator.gather(totals).view(-1, 2).sum(dim=0)
        return batches, totals

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This process's share of the step's loss; the shares of all micro-batches and processes add up to it."""
        settings = self.supervision
        align = settings.align_weight > 0 and self.teacher is not None
        with self._lockstep():
            taught = None if self.teacher is None else [self.teacher.targets(record) for record in inputs["records"]]
            states = batch_states(model, inputs, layers=align, store=self.prompt_store)
        tensors = (inputs[name] for name in ("targets", "predictors", "target_weights"))
        targets, rows, weights = (tensor.to(states.final.device) for tensor in tensors)
        if settings.needs_disagreement:
            extra = self._disagreement(taught).to(weights)
            weights = weights.flatten().index_add(0, rows, extra).view(weights.shape)
        totals = num_items_in_batch
        if totals is None:
            totals = torch.stack([weights.to(sum_dtype(weights.device)).sum(), weights.new_tensor(len(rows))])
        weight_sum, tokens = totals.to(weights.device, torch.float32)
        distill = taught is not None and settings.kl_weight > 0
        loss = ops.linear_cross_entropy(
            self.head.inputs(states.final),
            self.head.weight,
            targets,
            weights,
            rows=rows,
            **self.head.options,
            teacher=self._distributions(taught) if distill else None,
            kl_weight=settings.kl_weight if distill else 0.0,
            denominator=(weight_sum, tokens) if distill else weight_sum,
        )
        if align:
            loss = loss + settings.align_weight * self._misalignment(states.layers, rows, taught) / tokens
        # Data parallelism averages gradients over processes; the totals above already count all of them.
        loss = loss.to(inputs["targets"].device) * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def _lockstep(self):
        return sharding.lockstep(self.model, self.args) if self.args.fsdp else nullcontext()

    def _distributions(self, taught: list[TeacherTargets]):
        device = self.head.weight.device
        if taught[0].final is not None:
            return torch.cat([t.final for t in taught]).to(device)
        columns = zip(*(t.statistics for t in taught), strict=True)
        return ops.TeacherStatistics(*(torch.cat(column).to(device) for column in columns))

    def _disagreement(self, taught: list[TeacherTargets]) -> torch.Tensor:
        fraction, weight = self.supervision.disagreement_fraction, self.supervision.pathology_weight
        return torch.cat([disagreement_weights(t.disagreement, fraction, weight) for t in taught])

    @staticmethod
    def _misalignment(layers: list[torch.Tensor], rows: torch.Tensor, taught: list[TeacherTargets]) -> torch.Tensor:
        """sum_t mean_l |h_lt - teacher h_lt|^2 / D, in float32."""
        teacher = torch.cat([t.layers for t in taught], dim=1).to(rows.device)
        total = torch.zeros((), device=rows.device)
        for student, target in zip(layers, teacher, strict=True):
            steered = student.flatten(0, 1).index_select(0, rows.to(student.device)).to(rows.device)
            difference = steered.float() - target.float()
            total = total + difference.square().mean(dim=-1).sum()
        return total / len(layers)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            names = ", ".join(record.id for record in inputs["records"])
            raise InputError(
                f"training: the loss became {loss.item()} at step {self.state.global_step + 1} on records {names}; "
                "lower learning_rate, or look at these records"
            )
        return loss

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Held-out negative log-likelihood per token (plain, unweighted) and perplexity; with `eval_reports`, scores of
        reports that the model writes."""
        model, nll, tokens = self.model, 0.0, 0
        model.eval()
        for batch in self.get_eval_dataloader(eval_dataset):
            with self._lockstep():
                sums = batch_nll(model, self._prepare_inputs(batch))
            sums, counts = self.accelerator.gather_for_metrics(sums)
            nll, tokens = nll + sums.cpu().double().sum().item(), tokens + counts.sum().item()
        loss = nll / max(tokens, 1)
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": float(torch.tensor(loss).exp()),
        }
        if getattr(self.args, "eval_reports", 0):
            records = self.eval_dataset if eval_dataset is None else eval_dataset
            scores = eval_reports.write_and_score(
                model, records, self.encoder, self.args, self.supervision.span_tagger(), self._lockstep()
            )
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial)) / f"{checkpoints.PREFIX}{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # what an interrupted save left behind
        self.accelerator.wait_for_everyone()
        keep, self.args.save_total_limit = self.args.save_total_limit, None  # older ones go once this one is whole
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.write_manifest(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            last = checkpoints.newest_complete(folder.parent)
            kept = f"the last whole checkpoint is {last}" if last else "there is no earlier checkpoint"
            raise InputError(
                f"output_dir: saving {folder} failed ({error}); {kept}. Free disk space, then resume"
            ) from error
        except KeyboardInterrupt:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = keep
        if self.args.should_save:
            checkpoints.rotate(folder.parent, keep, self.state.best_model_checkpoint)


class StepTimer(TrainerCallback):
    """Times whole steps, from asking for their records to the updated weights: no saving, evaluating or starting up.

    Attributes:
        steps, seconds: of this process, so a resumed run counts what it did itself.
    """

    def __init__(self):
        self.steps, self.seconds, self._begin = 0, 0.0, None

    def start(self) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.steps, self.seconds = self.steps + 1, self.seconds + time.perf_counter() - self._begin


def _runs_prompts_alone(model) -> bool:
    """Whether prompts belong to the frozen model, so that they need no gradient; PEFT's own methods adapt them too."""
    scopes = {getattr(model.peft_config[name], "scope", None) for name in model.active_adapters}
    return scopes == {"response"} and can_run_prefixes(model)
