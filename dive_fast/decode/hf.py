"""Decoding by transformers' own `generate`, with the steering inside: any model, any device."""

import torch


def transformers_options(
    max_new_tokens: int, min_new_tokens: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> dict:
    """The arguments of a model's `generate` that shape its tokens; a temperature of 0 is greedy."""
    options = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens or None,
        "repetition_penalty": penalty,
        "do_sample": temperature > 0,
        "num_beams": 1,
    }
    # The model's own generation config must not add what was not asked for.
    sampling = {"temperature": None, "top_k": None, "top_p": None, "min_p": None}
    if temperature > 0:
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p or None}
    return options | sampling


@torch.no_grad()
def run_batch(
    model, batch: dict, options: dict, eos: set[int], pad: int, adapter_names, streamer, log_probs: bool
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Every row's new tokens, up to and including its EOS, and their log-probabilities under the unshaped logits."""
    device = next(model.parameters()).device
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    extra = {} if adapter_names is None else {"adapter_names": adapter_names}
    if streamer is not None:
        extra["streamer"] = streamer
    options = options | {"eos_token_id": sorted(eos) or None, "pad_token_id": pad}
    out = model.generate(**batch, **options, **extra, return_dict_in_generate=True, output_logits=log_probs)
    new = out.sequences[:, batch["input_ids"].shape[1] :]
    found = [None] * len(new)
    if log_probs:
        steps = [x.float().log_softmax(-1).gather(-1, new[:, i, None]) for i, x in enumerate(out.logits)]
        found = torch.cat(steps, dim=1).cpu()
    rows = [_until_eos(row, eos) for row in new.cpu()]
    return [(row, None if p is None else p[: len(row)].clone()) for row, p in zip(rows, found, strict=True)]


def _until_eos(row: torch.Tensor, eos: set[int]) -> torch.Tensor:
    """The row up to and including its first EOS; what follows is padding."""
    ends = torch.isin(row, torch.tensor(sorted(eos), dtype=row.dtype)).nonzero() if eos else []
    return row[: int(ends[0]) + 1].clone() if len(ends) else row.clone()
