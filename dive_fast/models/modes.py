"""Eval mode for a while, with every module's own mode given back."""

from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module):
    """`model.eval()` within. Modules that were in training before are again behind it, and no others."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
