"""Decoding by transformers' own `generate`, with the steering inside: any model, any device."""

from collections.abc import Callable, Sequence

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from dive_fast.decode.native import Row
from dive_fast.decode.options import Options
from dive_fast.decode.stop import special_ids


def transformers_options(options: Options) -> dict:
    """The arguments of a model's `generate` that shape its tokens; a temperature of 0 is greedy."""
    drawn = options.temperature > 0
    found = {
        "max_new_tokens": options.max_new_tokens,
        "min_new_tokens": options.min_new_tokens or None,
        "repetition_penalty": options.repetition_penalty,
        "do_sample": drawn,
        "num_beams": options.num_beams,
        "num_return_sequences": options.num_return_sequences,
        # The model's own generation config must not draw, penalise or stop otherwise than asked; its rules about single
        # tokens (suppress_tokens, bad_words_ids) stay.
        "stop_strings": None,
        "temperature": options.temperature if drawn else None,
        "top_k": options.top_k if drawn else None,
        "top_p": options.top_p if drawn else None,
        "min_p": (options.min_p or None) if drawn else None,
    }
    if options.num_beams > 1:
        found |= {"length_penalty": options.length_penalty, "early_stopping": options.early_stopping}
    return found


class _Ends(StoppingCriteria):
    """Ends rows at stop strings of their new text, and all of them where the call was cancelled.

    Attributes:
        stopped: row -> its new tokens when a stop string was complete.
    """

    def __init__(self, prompt_length: int, tokenizer, stop: Sequence[str], cancelled: Callable[[], bool] | None):
        self.prompt_length, self.cancelled = prompt_length, cancelled
        self.strings = StopStringCriteria(tokenizer, list(stop)) if stop else None
        self.special = torch.tensor(sorted(special_ids(tokenizer))) if stop else None
        self.stopped: dict[int, int] = {}

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if self.strings is not None:
            done = self._match(input_ids[:, self.prompt_length :])
            for row in done.nonzero().flatten().tolist():
                self.stopped.setdefault(row, input_ids.shape[1] - self.prompt_length)
        return torch.ones_like(done) if self.cancelled is not None and self.cancelled() else done

    def _match(self, new: torch.Tensor) -> torch.Tensor:
        """Of the new tokens alone, and without the special ones, which a text does not show."""
        shown = ~torch.isin(new, self.special.to(new.device))
        # Stable, so the shown ones move to the end in their order; what is before them matches nothing.
        order = shown.long().argsort(dim=1, stable=True)
        nothing = torch.iinfo(torch.int32).max
        return self.strings(torch.where(shown, new, nothing).gather(1, order), None)


@torch.no_grad()
def run_batch(
    model, batch: dict, options: Options, *, eos: set[int], pad: int, adapter_names, streamer, tokenizer, cancelled
) -> list[Row]:
    """Every row's results, `num_return_sequences` each: up to and including what ended them."""
    device = next(model.parameters()).device
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    length = batch["input_ids"].shape[1]
    extra = transformers_options(options) | {"eos_token_id": sorted(eos) or None, "pad_token_id": pad}
    if adapter_names is not None:
        extra["adapter_names"] = adapter_names
    if streamer is not None:
        extra["streamer"] = streamer
    ends = _Ends(length, tokenizer, options.stop, cancelled)
    if options.stop or cancelled is not None:
        extra["stopping_criteria"] = StoppingCriteriaList([ends])
    out = model.generate(**batch, **extra, return_dict_in_generate=True, output_logits=options.log_probs)
    new = out.sequences[:, length:]
    found = _log_probs(out, new) if options.log_probs else [None] * len(new)
    if options.num_beams > 1:
        lengths = _beam_lengths(out, new)
    else:
        lengths = [ends.stopped.get(row, new.shape[1]) for row in range(len(new))]
    return [
        _row(tokens[:count].tolist(), log_probs, row in ends.stopped, eos, options)
        for row, (tokens, log_probs, count) in enumerate(zip(new.cpu(), found, lengths, strict=True))
    ]


def _row(tokens: list[int], log_probs, stopped: bool, eos: set[int], options: Options) -> Row:
    """Behind the first EOS there is padding; it comes before a stop string where both are there."""
    end = next((i + 1 for i, token in enumerate(tokens) if token in eos), None)
    if end is not None:
        tokens, finish = tokens[:end], "eos"
    elif stopped:
        finish = "stop"
    else:
        finish = "length" if len(tokens) >= options.max_new_tokens else "cancelled"
    return Row(tokens, [] if log_probs is None else log_probs[: len(tokens)].tolist(), finish)


def _beam_lengths(out, new: torch.Tensor) -> list[int]:
    """New tokens of every result, behind which there is padding."""
    return (
        (out.beam_indices >= 0).sum(dim=1).tolist()
        if out.get("beam_indices") is not None
        else [new.shape[1]] * len(new)
    )


def _log_probs(out, new: torch.Tensor) -> torch.Tensor:
    """[rows, tokens] under the unshaped logits."""
    rows = out.get("beam_indices")
    steps = []
    for i in range(new.shape[1]):
        logits = out.logits[i] if rows is None else out.logits[i][rows[:, i].clamp(min=0)]
        steps.append(logits.float().log_softmax(-1).gather(-1, new[:, i, None]))
    return torch.cat(steps, dim=1).cpu()
