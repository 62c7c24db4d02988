"""What a report consists of: chapters in their order, each with its plots and tables by name."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from dive_fast.bench import end_to_end_plots, plots, scaling_plots
from dive_fast.bench.share_plots import shares


class Drawing(NamedTuple):
    """A plot: records -> a figure or None, and what it shows in a sentence."""

    draw: Callable
    caption: str


class Chapter(NamedTuple):
    """A part of the report.

    Attributes:
        lead: a sentence below the heading.
        plots: file's stem -> drawing.
        tables: names of `group_tables.GROUPS`, or "fits".
    """

    heading: str
    lead: str
    plots: Mapping[str, Drawing]
    tables: Sequence[str]


CHAPTERS: Mapping[str, Chapter] = {
    "end-to-end": Chapter(
        "What a user waits for",
        "Training until held-out reports are predicted well, and reports written with prompts and prefill included.",
        {
            "end-to-end-training": Drawing(
                end_to_end_plots.training_curves, "Held-out loss over seconds of training; evaluations are not counted."
            ),
            "end-to-end-memory": Drawing(
                end_to_end_plots.training_memory, "Peak memory of a step on the run's largest batch."
            ),
            "end-to-end-reports": Drawing(
                end_to_end_plots.reports_per_minute,
                "Reports a minute, with reports that end where the model ends them.",
            ),
        },
        ("training", "reports"),
    ),
    "decode": Chapter(
        "Decoding",
        "Steps behind prompts that have been run, in turn with reading the bytes that a step needs.",
        {
            "decode-steps": Drawing(
                plots.decode_steps, "Time per step; the dashed line is the time to read what a step of ours must read."
            ),
            "share-decode": Drawing(shares("decoding"), "How near a step comes to its limit, with 95 % intervals."),
            "share-decode-kernels": Drawing(
                shares("decoding kernels"), "How near the projections come to reading their weights."
            ),
        },
        ("decode-ratios", "decode", "decode-kernels"),
    ),
    "steering": Chapter(
        "What steering costs",
        "Adapters on every layer, steered and unsteered runs in turn.",
        {
            "steering-overhead": Drawing(
                plots.steering_overhead,
                "Added to a step, in percent, with 95 % intervals; a black bar is a target.",
            ),
            "share-steer-op": Drawing(shares("steering op"), "The op alone, against copying the bytes that it moves."),
        },
        ("steering", "steer-op"),
    ),
    "training-step": Chapter(
        "Training step",
        "Forward, backward and AdamW on one batch, in turn with what would be written instead.",
        {
            "train-steps": Drawing(plots.train_steps, "How many times faster a step is than each of the others."),
            "train-memory": Drawing(plots.train_memory, "Peak memory over that of plain hooks."),
        },
        ("train-step",),
    ),
    "loss": Chapter(
        "Loss",
        "Forward and backward through a frozen head.",
        {
            "loss-memory": Drawing(plots.loss_memory, "Peak memory by implementation."),
            "share-loss": Drawing(
                shares("loss"),
                "The bare products by torch.mm over the loss's time; above 1 it is faster than they are.",
            ),
        },
        ("loss-ratios", "loss"),
    ),
    "scaling": Chapter(
        "How costs grow",
        "Few rounds at each size, ours in turn with a peer.",
        {
            "scaling-time": Drawing(
                scaling_plots.times,
                "Time against size, both logarithmic, with the spread of the rounds; the lines are a + b × size.",
            ),
            "scaling-memory": Drawing(scaling_plots.memory, "Peak memory against size, both logarithmic."),
        },
        ("fits",),
    ),
    "evaluate": Chapter(
        "Metrics",
        "Documents scored in a second; the values are compared with pycocoevalcap's own before anything is timed.",
        {"evaluate": Drawing(end_to_end_plots.documents_per_second, "Documents a second, with 95 % intervals.")},
        ("evaluate",),
    ),
}
