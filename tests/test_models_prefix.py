"""What follows a cached prompt equals what follows it in one run."""

import pytest
import torch

from dive_fast.models.hidden import hidden_states
from dive_fast.models.prefix import continue_prefix, run_prefix
from tests.tiny_models import FAMILIES, tiny_model

PROMPTS, RESPONSES = (7, 3, 9), (4, 6, 2)


def tokens(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (p + r,), generator=generator) for p, r in zip(PROMPTS, RESPONSES, strict=True)]


def padded(rows, side):
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_behind_a_prefix_are_those_of_one_run(family):
    model, rows = tiny_model(family, torch.float64), tokens()
    whole = hidden_states(model, padded(rows, "right"), layers=True)
    prefix = run_prefix(model, padded([row[:p] for row, p in zip(rows, PROMPTS, strict=True)], "left"))
    behind = padded([row[p:] for row, p in zip(rows, PROMPTS, strict=True)], "right")
    for _ in range(2):  # the prefix is not used up
        part = continue_prefix(model, prefix, **behind, layers=True)
        for i, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            torch.testing.assert_close(part.final[i, :r], whole.final[i, p : p + r], rtol=1e-9, atol=1e-10)
            for a, b in zip(part.layers, whole.layers, strict=True):
                torch.testing.assert_close(a[i, :r], b[i, p : p + r], rtol=1e-9, atol=1e-10)
