"""Which positions of a forward pass are steered, the same in training, prefill and cached decoding.

A steered hidden state changes the keys and values of every later layer at its position, so the positions are part of
the model. Position t is a *response position* when token t + 1 belongs to the response: the last prompt token up to
the last-but-one response token. `prompt` is what lies before, `all` is both; padding is never steered.

B batch rows, T tokens of this forward, S tokens including those already cached.
"""

from dataclasses import dataclass, field

import torch

from dive_fast.errors import InputError

STEERING_KWARG = "dive_steering"
"""The keyword under which a decoder's layers receive the `SteeringCall`."""


@dataclass
class Generation:
    """A running `generate`: the prompt's length and padding, which later single-token steps no longer show."""

    prompt_length: int
    prompt_mask: torch.Tensor | None  # [B, prompt_length], 0 on padding


@dataclass
class SteeringCall:
    """What the steered layers of one forward pass need; it travels with the pass through the layers' keyword arguments.

    It is an argument, not state of the model, so that a recomputation under activation checkpointing sees what its own
    forward saw even when other forwards ran in between.

    Attributes:
        masks: scope -> [B, T] bool; None where every position is steered.
        rows: adapter name -> indices of the batch rows it steers; None: the active adapters steer every row.
        visits: how many steered layers saw this call.
    """

    masks: dict[str, torch.Tensor | None]
    rows: dict[str, torch.Tensor] | None = None
    visits: int = field(default=0, compare=False)
    _elsewhere: dict[torch.device, "SteeringCall"] = field(default_factory=dict, init=False, repr=False, compare=False)

    def on(self, device: torch.device) -> "SteeringCall":
        """The same with its tensors on `device`, for the layers of a model that lies on several."""
        tensors = [mask for mask in self.masks.values() if mask is not None] + list((self.rows or {}).values())
        if not tensors or tensors[0].device == device:
            return self
        if device not in self._elsewhere:
            masks = {scope: None if mask is None else mask.to(device) for scope, mask in self.masks.items()}
            rows = None if self.rows is None else {name: index.to(device) for name, index in self.rows.items()}
            self._elsewhere[device] = SteeringCall(masks, rows)
        return self._elsewhere[device]


def response_positions_from_labels(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """[B, T] bool: position t predicts a labelled token, i.e. `labels[t + 1] != ignore_index`."""
    positions = torch.zeros_like(labels, dtype=torch.bool)
    positions[:, :-1] = labels[:, 1:] != ignore_index
    return positions


def steering_masks(
    scopes: set[str],
    shape: tuple[int, int],
    *,
    device: torch.device,
    past_length: int,
    attention_mask: torch.Tensor | None,
    response_positions: torch.Tensor | None,
    generation: Generation | None,
) -> dict[str, torch.Tensor | None]:
    """The masks of one forward pass over `shape` = (B, T) new tokens behind `past_length` cached ones.

    In order of precedence the response positions are the ones given (`response_positions`, which the labels imply in
    training), those behind the prompt of a running `generate`, or, with neither, the convention of a decoding loop
    written by hand: the first call (nothing cached) is the prompt, whose last token is steered, and every token after
    a cache is response.
    """
    real = _real_tokens(shape, past_length, attention_mask, generation, device)
    every = real
    if real is None:
        real = torch.ones(shape, dtype=torch.bool, device=device)
    masks: dict[str, torch.Tensor | None] = {}
    if "all" in scopes:
        masks["all"] = every
    if scopes - {"all"}:
        response = _response_positions(shape, real, past_length, response_positions, generation, device)
        if "response" in scopes:
            masks["response"] = every if response is None else response & real
        if "prompt" in scopes:
            before = torch.zeros_like(real) if response is None else response.cumsum(dim=1) == 0
            masks["prompt"] = before & real
    return masks


def _real_tokens(shape, past_length, attention_mask, generation, device) -> torch.Tensor | None:
    """[B, T] bool, False on padding; None where nothing says that there is any."""
    rows, length = shape
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        if attention_mask.shape[1] == length:
            return attention_mask.to(device).bool()
        if attention_mask.shape[1] >= past_length + length:
            return attention_mask[:, past_length : past_length + length].to(device).bool()
        raise InputError(
            f"attention_mask: expected {past_length + length} columns ({past_length} cached + {length} new), "
            f"got {attention_mask.shape[1]}"
        )
    if generation is None or generation.prompt_mask is None or past_length >= generation.prompt_length:
        return None
    prompt = generation.prompt_mask.to(device).bool()
    prompt = prompt.repeat_interleave(rows // prompt.shape[0], dim=0)
    real = torch.ones(rows, max(prompt.shape[1], past_length + length), dtype=torch.bool, device=device)
    real[:, : prompt.shape[1]] = prompt
    return real[:, past_length : past_length + length]


def _response_positions(shape, real, past_length, given, generation, device) -> torch.Tensor | None:
    """[B, T] bool; None where every new token is a response position."""
    length = shape[1]
    if given is not None:
        if tuple(given.shape) != tuple(shape):
            raise InputError(f"response_positions: expected shape {tuple(shape)}, got {tuple(given.shape)}")
        return given.to(device).bool()
    if generation is not None:
        first = generation.prompt_length - 1
        if past_length >= first:
            return None
        index = torch.arange(past_length, past_length + length, device=device)
        return (index >= first).expand(shape)
    if past_length > 0:
        return None
    index = torch.arange(length, device=device)
    last = torch.where(real, index, -1).amax(dim=1, keepdim=True)
    return index == last
