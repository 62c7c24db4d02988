"""What the project has set out to reach, and which record of the suite decides it.

A target names a figure of a record. One without such a record among the results is "not measured". Those for a GPU
were set with an H100 in mind; the page names the device that decided them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from dive_fast.bench.results import Interval, Record


class Target(NamedTuple):
    """A bound on a figure.

    Attributes:
        what: in words, without the bound.
        group: of the record.
        where: values that the record has.
        figure: the path to the figure in the record.
        least, most: the bound; one of them is None.
        per: the figure is 1 / what the record holds ("n times faster" of "takes this share of the time").
        scale, unit: what the figure is multiplied with to be shown, and what is written behind it.
    """

    what: str
    group: str
    where: Mapping[str, object]
    figure: tuple[str, ...]
    least: float | None = None
    most: float | None = None
    per: bool = False
    scale: float = 1.0
    unit: str = ""

    @property
    def bound(self) -> str:
        sign, value = ("≥", self.least) if self.most is None else ("≤", self.most)
        return f"{sign} {value:g}{self.unit}"

    def found_in(self, record: Record) -> Interval | None:
        """The figure, as it is shown."""
        figure = record.interval(*self.figure)
        if figure is None:
            return None
        return figure.under(self.scale) if self.per else figure.times(self.scale)

    def holds(self, value: float) -> bool:
        return value >= self.least if self.most is None else value <= self.most


class Verdict(NamedTuple):
    """A target and what was found.

    Attributes:
        status: "met", "missed" or "not measured"; by the median.
        clear: the whole interval lies on that side of the bound.
        record: that decided it, or None.
    """

    target: Target
    status: str
    figure: Interval | None = None
    clear: bool = True
    record: Record | None = None


def judge(records: Iterable[Record], targets: Iterable[Target] | None = None) -> list[Verdict]:
    """What became of the targets (default: `TARGETS`), in their order."""
    records = list(records)
    return [_verdict(target, records) for target in (TARGETS if targets is None else targets)]


def _verdict(target: Target, records: Sequence[Record]) -> Verdict:
    for record in records:
        if record.group != target.group or any(record.get(key) != value for key, value in target.where.items()):
            continue
        figure = target.found_in(record)
        if figure is not None:
            status = "met" if target.holds(figure.median) else "missed"
            ends = (figure.low, figure.high) if figure.known else (figure.median,)
            clear = len({target.holds(end) for end in (figure.median, *ends)}) == 1
            return Verdict(target, status, figure, clear, record)
    return Verdict(target, "not measured")


def _loss(valid: str) -> dict:
    return {"problem": f"smollm2-135m-float32-T1024-valid{valid}-mean", "device": "cpu"}


EAGER = "eager float32 logits"
LOSS = (
    Target("loss, 30 % of 1024 rows count: time : eager's", "loss ratios", _loss("30%"), ("ratios", EAGER), most=0.28),
    Target(
        "loss, 30 % of 1024 rows count: peak memory : eager's",
        "loss ratios",
        _loss("30%"),
        ("ratios", EAGER, "peak_memory"),
        most=0.2,
    ),
    Target("loss, 1024 rows count: time : eager's", "loss ratios", _loss("100%"), ("ratios", EAGER), most=0.70),
)


def _train_step(scope: str, least: float, batch: str, words: str) -> Target:
    where = {"problem": f"cpu-smollm2-float32-{batch}", "implementation": f"dive_fast scope {scope}"}
    what = f"training step, {words}, scope {scope}: faster than plain hooks"
    return Target(what, "train-step", where, ("ratios", "plain hooks"), least=least, per=True, unit=" ×")


TRAINING = (
    _train_step("all", 1.1, "batch8-open_i", "Open-i"),
    _train_step("response", 1.35, "batch8-open_i", "Open-i"),
    _train_step("response, prompts kept", 1.8, "batch8-open_i", "Open-i"),
    _train_step("response", 1.7, "batch2-prompt512", "prompts of 512 tokens"),
    _train_step("response, prompts kept", 6.0, "batch2-prompt512", "prompts of 512 tokens"),
)


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _decode(rows: int, implementation: str = "dive_fast") -> dict:
    return {"problem": f"smollm2-bfloat16-B{rows}", "implementation": implementation}


def _faster(rows: int, than: str, least: float, implementation: str = "dive_fast", ours: str = "bfloat16") -> Target:
    what = f"decoding on the CPU, {ours}, {_rows(rows)}: faster than {than}"
    name = {"our bfloat16": "dive_fast", "transformers bfloat16": "transformers"}.get(than, than)
    where = _decode(rows, implementation)
    return Target(what, "decode ratios", where, ("ratios", name), least=least, per=True, unit=" ×")


def _beyond(rows: int) -> Target:
    return Target(
        f"decoding on the CPU, bfloat16, {_rows(rows)}: memory beyond weights and cache",
        f"decode smollm2-bfloat16-B{rows}",
        _decode(rows) | {"steering": "unsteered"},
        ("memory_beyond_weights_and_cache",),
        most=64,
        scale=2**-20,
        unit=" MiB",
    )


def _steering(rank: int, rows: int, most: float, different: bool = False) -> Target:
    adapters = "8 different adapters" if different else "steering"
    where = _decode(rows) | {"steering": f"lowrank-r{rank}{'-different' * different}"}
    what = f"{adapters} on all layers, CPU, rank {rank}, {_rows(rows)}: added to a step"
    return Target(what, "decode steering", where, ("overhead_percent",), most=most, unit=" %")


DECODING = (
    Target(
        "decoding on the CPU, bfloat16, 1 row: share of the read limit",
        "decode smollm2-bfloat16-B1",
        _decode(1) | {"steering": "unsteered"},
        ("share_of_read_limit",),
        least=85,
        scale=100,
        unit=" %",
    ),
    _faster(1, "transformers bfloat16", 3.5),
    _faster(8, "transformers bfloat16", 3.0),
    _faster(1, "our bfloat16", 1.6, "dive_fast int8", "int8"),
    _faster(1, "llama.cpp Q4_1", 1.0, "dive_fast int8", "int8"),
    *map(_beyond, (1, 4, 8)),
    _steering(16, 1, 1.0),
    _steering(64, 1, 3.0),
    _steering(16, 8, 4.0),
    _steering(64, 8, 4.0),
    _steering(64, 8, 12.0, different=True),
)


# What a record calls them, what people do, and what ours is to reach beside them.
GPU_PEERS = (
    ("transformers", "transformers", 2.5),
    ("transformers static compiled", "transformers with a static cache and torch.compile", 1.0),
)


def _on_gpu(model: str, name: str, share: float) -> Iterator[Target]:
    ours = {"device": "cuda", "implementation": "dive_fast"}
    for rows, least in ((1, share), (8, 60), (32, 60)):
        where = ours | {"problem": f"{model}-bfloat16-B{rows}"}
        yield Target(
            f"decoding on a GPU, {name}, {_rows(rows)}: share of the floor",
            f"decode {model}-bfloat16-B{rows}",
            where | {"steering": "unsteered"},
            ("share_of_floor",),
            least=least,
            scale=100,
            unit=" %",
        )
    for rows in (1, 8, 32):
        where = ours | {"problem": f"{model}-bfloat16-B{rows}"}
        for peer, words, least in GPU_PEERS:
            what = f"decoding on a GPU, {name}, {_rows(rows)}: faster than {words}"
            yield Target(what, "decode ratios", where, ("ratios", peer), least=least, per=True, unit=" ×")
        for different, most in ((False, 1.0), (True, 3.0)):
            if different and rows != 8:
                continue
            adapters = "8 different adapters" if different else "steering"
            yield Target(
                f"{adapters} on all layers, GPU, {name}, rank 64, {_rows(rows)}: added to a step",
                "decode steering",
                where | {"steering": f"lowrank-r64{'-different' * different}"},
                ("overhead_percent",),
                most=most,
                unit=" %",
            )


MODELS = (("mistral-7b", "Mistral-7B", 75), ("qwen2.5-7b", "Qwen2.5-7B", 75), ("gemma3-4b", "Gemma3-4B", 65))
TARGETS = (*LOSS, *TRAINING, *DECODING, *(target for model in MODELS for target in _on_gpu(*model)))
