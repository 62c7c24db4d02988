"""The tables that a README shows: each takes records and is made of their figures alone."""

from collections.abc import Callable, Sequence
from typing import Any

from dive_fast.bench.group_tables import fit_table, group_table
from dive_fast.bench.results import LEAST_ROUNDS, Record
from dive_fast.bench.table import NONE, Table, digits, duration, faster, fixed, size
from dive_fast.bench.targets import judge
from dive_fast.errors import InputError


def _of(records: Sequence[Record], group: str, **values) -> list[Record]:
    """The records of a group with these values; a group "decode" has its problem behind it."""
    return [
        record
        for record in records
        if (record.group == group or record.get("problem") and record.group == f"{group} {record.get('problem')}")
        and all(record.get(key) == value for key, value in values.items())
    ]


def _some(found: Any, table: str) -> Any:
    """Records or a table, where there are any."""
    if not found:
        raise InputError(f"table {table}: the files hold no record for it; name the results file of that group")
    return found


def as_on_the_page(name: str) -> Callable[[Sequence[Record]], Table]:
    """What makes a table of the report page: a name of `group_tables.GROUPS`, or "fits"."""

    def make(records: Sequence[Record]) -> Table:
        return _some(fit_table(records) if name == "fits" else group_table(name, records), name)

    return make


DECODE_NAMES = {
    "dive_fast": "ours, bfloat16",
    "dive_fast int8": 'ours, `weights="int8"`',
    "transformers": "transformers `generate`, bfloat16",
    "llama.cpp Q4_1": "llama.cpp, Q4_1 (4 bits)",
}


def decode(records: Sequence[Record]) -> Table:
    """Step, rate, share of the read limit and first token of SmolLM2 in bfloat16, unsteered."""
    found = _some(_of(records, "decode", dtype="bfloat16", steering="unsteered", device="cpu"), "decode")
    order = list(DECODE_NAMES)
    found = [record for record in found if record.get("implementation") in order]
    found.sort(key=lambda record: (record.get("B"), order.index(record.get("implementation"))))
    rows = [
        [
            DECODE_NAMES[record.get("implementation")],
            str(record.get("B")),
            f"{record.get('milliseconds_per_step'):.2f} ms",
            f"{record.get('tokens_per_second'):.0f}",
            fixed(record.interval("share_of_read_limit")),
            duration(record.get("first_token_seconds")),
        ]
        for record in found
    ]
    columns = ["", "rows", "per step", "tokens/s", "share of the read limit (95 % interval)", "first token"]
    ours = [i for i, record in enumerate(found) if record.get("implementation").startswith("dive_fast")]
    prompt, new = (_range(r.get(name) for r in found) for name in ("prompt_tokens", "new_tokens"))
    note = f"{new} new tokens behind prompts of {prompt}; the median of {_range(r.rounds for r in found)} runs each."
    return Table("Decoding", columns, rows, strong=frozenset(ours), note=note)


def decode_ratios(records: Sequence[Record]) -> Table:
    """How many times faster decoding is than its peers, paired."""
    found = _some(_of(records, "decode ratios", device="cpu"), "decode-ratios")
    found.sort(key=lambda record: (record.get("implementation"), record.get("B")))
    peers = {"transformers": "transformers, bfloat16", "transformers float32": "transformers, float32"}
    peers |= {"dive_fast": "our bfloat16", "llama.cpp Q4_1": "llama.cpp, Q4_1"}
    peers = {name: label for name, label in peers.items() if any(r.get("ratios", name) for r in found)}
    rows = [
        [DECODE_NAMES[r.get("implementation")], str(r.get("B"))]
        + [faster(r.interval("ratios", name)) for name in peers]
        for r in found
    ]
    columns = ["faster than (95 % interval)", "rows", *peers.values()]
    note = f"Measured in turn; the median of {_range(r.rounds for r in found)} quotients each."
    return Table("Decoding beside its peers", columns, rows, note=note)


def _range(counts) -> str:
    counts = sorted(set(counts))
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


STEERINGS = {
    "fixed": "`fixed` (LIVE)",
    "gated": "`gated`",
    "lowrank-r{rank}": "`lowrank`, rank {rank}",
    "reft-r{rank}": "`reft`, rank {rank}",
    "lowrank-r{rank}-different": "rank {rank}, a different adapter in every row",
}


def steering(records: Sequence[Record]) -> Table:
    """What steering adds to a step, by kind, rank and rows."""
    found = _some(_of(records, "decode steering", device="cpu"), "steering")
    cells: dict[tuple, dict[int, Record]] = {}
    for record in found:
        cells.setdefault(_steering_order(record), {})[record.get("B")] = record
    batches = sorted({record.get("B") for record in found})
    rows = [
        [_steering_label(next(iter(row.values())))] + [text for batch in batches for text in _overhead(row.get(batch))]
        for _, row in sorted(cells.items())
    ]
    counts = [f"{batch} row" + "s" * (batch > 1) for batch in batches]
    columns = ["adds to a step, in percent (95 % interval)", *(text for c in counts for text in (c, f"bytes, {c}"))]
    ours = [r.rounds for r in found if r.get("implementation") == "dive_fast"]
    note = (
        f'Steered and unsteered in turn, {_range(ours)} rounds; "bytes": what the adapters\' weights add to the bytes '
        "that a step reads, in percent."
    )
    return Table("Cost of steering", columns, rows, note=note)


def _steering_order(record: Record) -> tuple:
    name = record.get("steering")
    rank = next((int(part[1:]) for part in name.split("-") if part[1:].isdigit()), 0)
    pattern = name.replace(f"r{rank}", "r{rank}") if rank else name
    return record.get("implementation") != "dive_fast", list(STEERINGS).index(pattern), rank, pattern


def _steering_label(record: Record) -> str:
    _, _, rank, pattern = _steering_order(record)
    label = STEERINGS[pattern].format(rank=rank)
    return label if record.get("implementation") == "dive_fast" else f"{label}, by hooks in transformers"


def _overhead(record: Record | None) -> tuple[str, str]:
    if record is None:
        return NONE, NONE
    return fixed(record.interval("overhead_percent"), 1), f"{100 * record.get('adapter_bytes_share'):.1f}"


BASELINES = {
    "plain hooks": "faster than plain hooks",
    "NodiReFT by hooks": "than NodiReFT by hooks",
    "PEFT LoRA q, v": "than PEFT LoRA (q, v)",
}


def train_step(records: Sequence[Record]) -> Table:
    """A training step beside its peers, paired."""
    found = _some(_of(records, "train-step", device="cpu"), "train-step")
    # Ours counts a prompt's last token, which predicts the first of the report, as the report's.
    tokens = {problem: max(r.get("tokens") for r in found if r.get("problem") == problem) for problem in
              (r.get("problem") for r in found)}  # fmt: skip
    rows = []
    for r in found:
        prompts = tokens[r.get("problem")] - r.get("targets")
        batch = "Open-i reports" if r.get("problem").endswith("open_i") else "reports behind long prompts"
        reports = r.get("problem").split("-batch")[1].split("-")[0]
        rows.append(
            [
                f"{r.get('dtype')}, {reports} {batch} ({prompts} prompt, {r.get('targets')} report tokens)",
                r.get("implementation").removeprefix("dive_fast scope ").replace("prompts kept", "kept"),
                duration(r.seconds.median),
                *(faster(r.interval("ratios", name)) for name in BASELINES),
                fixed(r.interval("ratios", "plain hooks", "peak_memory")),
                f"{r.get('backbone_passes_saved'):.2f} ×",
            ]
        )
    columns = ["backbone and batch", "scope", "step", *BASELINES.values(), "peak memory : hooks'", "operations saved"]
    note = (
        f"Paired runs in turn, {_range(r.rounds for r in found)} rounds; in brackets the ratios' 95 % intervals, where "
        f"there are {LEAST_ROUNDS} rounds or more."
    )
    return Table("Training step", columns, rows, words=2, note=note)


LOSS_NAMES = {
    "dive_fast native": "ours",
    "eager float32 logits": "`F.cross_entropy(F.linear(...))`",
    "eager": "the same with logits in bfloat16",
    "eager valid rows": "the first on indexed rows",
    "torch.compile": "the first by `torch.compile`",
    "F.linear_cross_entropy": "`F.linear_cross_entropy`",
    "F.linear_cross_entropy chunks of 512": "… in chunks of 512",
    "Cut Cross-Entropy torch_compile": "Cut Cross-Entropy (torch_compile)",
}


def loss(records: Sequence[Record], dtype: str = "float32") -> Table:
    """The loss of 1024 rows of SmolLM2's head, by how many of them count."""
    wanted = {"T": 1024, "dtype": dtype, "reduction": "mean", "weighted": False, "kl": None, "device": "cpu"}
    found = _some(_of(records, "loss", **wanted) or _cpu_loss(records, wanted), "loss")
    counts = sorted({r.get("N") for r in found}, reverse=True)
    by_name = {(r.get("implementation"), r.get("N")): r for r in found}
    names = [name for name in LOSS_NAMES if any(key[0] == name for key in by_name)]
    rows = [
        [LOSS_NAMES[name]] + [text for n in counts for text in _loss_cells(by_name.get((name, n)))] for name in names
    ]
    columns = [dtype]
    for n in counts:
        columns += [f"{n} of 1024 rows count: time", "peak memory", "gradient's error"]
    return Table("Loss", columns, rows, strong=frozenset([0]))


def _cpu_loss(records: Sequence[Record], wanted: dict) -> list[Record]:
    # The group's name has the device in front of the problem's.
    return [r for r in records if r.group.startswith("loss cpu-") and all(r.get(key) == v for key, v in wanted.items())]


def _loss_cells(record: Record | None) -> list[str]:
    if record is None:
        return [NONE] * 3
    return [duration(record.seconds.median), size(record.get("peak_memory")), f"{record.get('gradient_error'):.0e}"]


def loss_ratios(records: Sequence[Record]) -> Table:
    """Time and memory of the loss over its peers', paired."""
    found = _some(_of(records, "loss ratios", device="cpu"), "loss-ratios")
    rows = []
    for r in found:
        for peer in r.get("ratios"):
            time, memory = r.interval("ratios", peer), r.interval("ratios", peer, "peak_memory")
            counted = f"{r.get('dtype')}, {r.get('N')} of {r.get('T')} rows count"
            rows.append([counted, LOSS_NAMES.get(peer, peer), fixed(time), fixed(memory)])
    columns = ["ours : a peer, paired", "", "time (95 % interval)", "peak memory"]
    return Table("Loss beside its peers", columns, rows, words=2)


def missed(records: Sequence[Record]) -> str:
    """A list of the targets that were missed, and of how many were met and not measured."""
    verdicts = judge(records)
    counts = {status: sum(v.status == status for v in verdicts) for status in ("met", "missed", "not measured")}
    on_gpu = sum(v.status == "not measured" and v.target.where.get("device") == "cuda" for v in verdicts)
    lines = [
        f"Of {len(verdicts)} targets {counts['met']} are met, {counts['missed']} missed and {counts['not measured']} "
        f"not measured ({on_gpu} of these want a GPU)."
    ]
    if counts["missed"]:
        lines += ["What fell short:", ""]
    for v in verdicts:
        if v.status == "missed":
            found = f"{digits(v.figure.median)}{v.target.unit}"
            ends = f", 95 % interval {digits(v.figure.low)} to {digits(v.figure.high)}" if v.figure.known else ""
            reach = "" if v.clear else ", which reaches the target"
            lines.append(f"- {v.target.what} {found}{ends}{reach} (target {v.target.bound})")
    return "\n".join(lines)
