"""The sections of the report page; each takes the result and returns HTML, or "" where its numbers are missing."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from dive_fast.report_assets import charts
from dive_fast.report_assets.numbers import (
    COLUMNS,
    Column,
    best_value,
    count,
    difference,
    label_of,
    measure,
    moment,
    present_columns,
    seconds,
    show,
    show_signed,
    size,
    subject,
)

Highlight = Callable[[str], tuple[str, frozenset]]


def section(identifier: str, heading: str, body: str, lead: str = "") -> str:
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<section aria-labelledby="{identifier}"><h2 id="{identifier}">{heading}</h2>{lead}{body}</section>'


def summary(result: Mapping, finding: str) -> str:
    """Title, finding, and what was measured on what."""
    data, facts = result.get("data") or {}, []
    if data.get("name"):
        facts.append(f"data {escape(str(data['name']))}")
    facts += [f"{_plain(data[key])} {words}" for key, words in _DATA_WORDS if data.get(key) is not None]
    if len(result.get("seeds") or ()) > 1:
        facts.append(f"means over {len(result['seeds'])} seeds")
    if result.get("protocol"):
        facts.append(f"scores by the {escape(str(result['protocol']))} protocol")
    if result.get("created"):
        facts.append(escape(moment(str(result["created"]))))
    title = escape(str(result.get("title") or "Steering report"))
    return (
        f'<header><p class="eyebrow">dive_fast · steering report</p><h1>{title}</h1>'
        f'<p class="finding">{escape(finding)}</p><p class="facts">{" · ".join(facts)}</p></header>'
    )


_DATA_WORDS = (("train", "reports to train on"), ("eval", "held-out reports"), ("unseen", "of them unseen in training"))


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else escape(str(value))


def key_figures(result: Mapping) -> str:
    """The figures of the adapter that the page is about, beside the baseline's."""
    system = subject(result)
    if system is None:
        return ""
    baseline = next((other for other in result["systems"] if other.get("role") == "baseline"), None)
    tiles = []
    for key in ("perplexity", "decisive_f1", "eos_rate"):
        column = next(column for column in COLUMNS if column.key == key)
        if found := measure(system, key):
            before = measure(baseline, key) if baseline else None
            note = f"{escape(label_of(baseline))}: {show(before.value, column)}" if before else ""
            tiles.append(_tile(column.label, show(found.value, column), note))
    if system.get("trainable_parameters"):
        trained = system.get("train_seconds")
        note = f"in {seconds(trained)}" if trained else ""
        tiles.append(_tile("Trained parameters", count(system["trainable_parameters"]), note))
    if not tiles:
        return ""
    return f'<dl class="tiles" aria-label="Key figures of {escape(label_of(system))}">{"".join(tiles)}</dl>'


def _tile(label: str, value: str, note: str) -> str:
    return f"<div><dt>{label}</dt><dd><b>{value}</b><small>{note or '&nbsp;'}</small></dd></div>"


def score_tables(result: Mapping) -> str:
    """Systems × scores over all held-out reports, and over those whose texts do not occur in training."""
    systems = result["systems"]
    body = _table(systems, systems, "All held-out reports")
    unseen = [{**(system.get("unseen") or {})} for system in systems]
    if present_columns(unseen):
        sizes = sorted({part["n"] for part in unseen if part.get("n") is not None})
        size = f" (n = {_plain(sizes[0])})" if len(sizes) == 1 else ""
        caption = f"Held-out reports whose text never occurs in training{size}"
        body += _table(systems, unseen, caption)
    body += _cost_table(systems)
    over = " over the choice of reports and seeds" if len(result.get("seeds") or ()) > 1 else ""
    lead = (
        f"Small print under a score is its 95 % bootstrap interval{over}. ↑ more is better, ↓ less is better; "
        "the best value of a column is bold."
    )
    return section("scores", "Scores", body, lead)


def differences(result: Mapping) -> str:
    """Every system's scores minus the reference's, with paired intervals; "" where nothing was compared."""
    systems = [system for system in result["systems"] if system.get("differences")]
    if not systems:
        return ""
    known = {str(system.get("name")): label_of(system) for system in result["systems"]}
    reference = known.get(str(result.get("compare_with")), str(result.get("compare_with")))
    looks = dict(zip(map(id, result["systems"]), charts.styles(result["systems"]), strict=True))
    body = _difference_table(systems, systems, looks, "All held-out reports")
    unseen = [system.get("unseen") or {} for system in systems]
    if any(part.get("differences") for part in unseen):
        body += _difference_table(systems, unseen, looks, "Held-out reports whose text never occurs in training")
    lead = (
        f"Each system minus {escape(reference)}, on the same resampled reports and seeds; bold where the 95 % interval "
        "leaves out 0. With many comparisons some do by chance."
    )
    return section("differences", f"Differences to {escape(reference)}", body, lead)


def _difference_table(systems: Sequence[Mapping], parts: Sequence[Mapping], looks: Mapping, caption: str) -> str:
    columns = [column for column in COLUMNS if any(difference(part, column.key) for part in parts)]
    head = "".join(f'<th scope="col">{column.label}&nbsp;{_arrow(column)}</th>' for column in columns)
    rows = ["".join(_difference_cell(part, column) for column in columns) for part in parts]
    return _rows(systems, caption, head, rows, [looks[id(system)] for system in systems])


def _difference_cell(part: Mapping, column: Column) -> str:
    found = difference(part, column.key)
    if found is None:
        return "<td>–</td>"
    (value, interval), clear = found
    text = f"<b>{show_signed(value, column)}</b>" if clear else show_signed(value, column)
    if interval:
        text += f"<small>{show_signed(interval[0], column)} … {show_signed(interval[1], column)}</small>"
    return f"<td>{text}</td>"


def _table(systems: Sequence[Mapping], parts: Sequence[Mapping], caption: str) -> str:
    columns = present_columns(parts)
    best = {column.key: best_value(parts, column) for column in columns}
    head = "".join(f'<th scope="col">{column.label}&nbsp;{_arrow(column)}</th>' for column in columns)
    rows = ["".join(_score_cell(part, column, best[column.key]) for column in columns) for part in parts]
    return _rows(systems, caption, head, rows)


def _cost_table(systems: Sequence[Mapping]) -> str:
    measured = any(system.get("costs") for system in systems)
    names = ["Trained parameters", "Training", "Generation"]
    if measured:
        names = [
            "Trained parameters",
            "Teacher",
            "Training",
            "Memory, training",
            "Generation",
            "Tokens/s",
            "Memory, writing",
        ]
    head = '<th scope="col" class="words">What it is</th>'
    head += "".join(f'<th scope="col">{name}</th>' for name in names)
    rows = []
    for system in systems:
        wrote = seconds(system.get("generate_seconds"))
        if system.get("generate_seconds") is not None and system.get("engine"):
            wrote += f" ({escape(str(system['engine']))})"
        trained = seconds(system.get("train_seconds"))
        spent = _measured_costs(system, trained, wrote) if measured else (trained, wrote)
        cells = "".join(f"<td>{text}</td>" for text in (count(system.get("trainable_parameters")), *spent))
        rows.append(f'<td class="words">{escape(str(system.get("description") or ""))}</td>{cells}')
    return _rows(systems, "The systems and what they cost", head, rows)


def _measured_costs(system: Mapping, trained: str, wrote: str) -> tuple[str, ...]:
    costs = system.get("costs") or {}
    teacher = "in training" if costs.get("teacher_in_training") else seconds(costs.get("teacher_seconds"))
    speed = costs.get("tokens_per_second")
    return (
        *(teacher, trained, size(costs.get("train_peak_bytes")), wrote),
        *("–" if speed is None else f"{speed:,.0f}", size(costs.get("write_peak_bytes"))),
    )


def _rows(
    systems: Sequence[Mapping],
    caption: str,
    head: str,
    cells: Sequence[str],
    looks: Sequence[charts.Style] | None = None,
) -> str:
    rows = [
        f'<tr><th scope="row">{_key(style)}{escape(label_of(system))}</th>{row}</tr>'
        for system, style, row in zip(systems, looks or charts.styles(systems), cells, strict=True)
    ]
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}, table"><table>'
        f'<caption><span>{escape(caption)}</span></caption><thead><tr><th scope="col">System</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _key(style: charts.Style) -> str:
    return f'<i class="key {style.colour} {style.marker}" aria-hidden="true"></i>'


def _arrow(column: Column) -> str:
    if column.lower_is_better:
        return '<span role="img" aria-label="less is better">↓</span>'
    return '<span role="img" aria-label="more is better">↑</span>'


def _score_cell(part: Mapping, column: Column, best: float | None) -> str:
    found = measure(part, column.key)
    if found is None:
        return "<td>–</td>"
    value = show(found.value, column)
    value = f"<b>{value}</b>" if found.value == best else value
    if found.interval:
        value += f"<small>{show(found.interval[0], column)} – {show(found.interval[1], column)}</small>"
    return f"<td>{value}</td>"


def score_plots(result: Mapping) -> str:
    """A panel of dots and intervals for each score."""
    systems = result["systems"]
    panels = []
    for column in present_columns(systems):
        points = [
            charts.Point(label_of(system), style, found.value, found.interval, show(found.value, column))
            for system, style in zip(systems, charts.styles(systems), strict=True)
            if (found := measure(system, column.key))
        ]
        note = "less is better" if column.lower_is_better else "more is better"
        # Perplexity and length error are the scores without an upper bound, and those where less is better.
        unbounded = column.lower_is_better
        panels.append(charts.interval_panel(column.label, note, points, percent=column.percent, unbounded=unbounded))
    if not panels:
        return ""
    return section("plots", "Scores with intervals", f'<div class="panels">{"".join(panels)}</div>')


def losses(result: Mapping) -> str:
    """Training and held-out losses over the steps."""
    systems = result["systems"]
    figures, shown = [], {}
    for key, title in (("loss", "Training loss"), ("eval_loss", "Held-out loss")):
        lines = []
        for system, style in zip(systems, charts.styles(systems), strict=True):
            points = charts.loss_points(system.get("history") or (), key)
            if points:
                lines.append(charts.Line(label_of(system), style, points))
                shown.setdefault(label_of(system), lines[-1])
        if lines:
            figures.append(charts.line_chart(title, "training steps", lines))
    if not figures:
        return ""
    lead = "Each system's own objective: losses with different token weights are not on one scale."
    body = charts.legend(list(shown.values())) + f'<div class="panels wide">{"".join(figures)}</div>'
    return section("losses", "Losses", body, lead)


def lengths(result: Mapping) -> str:
    """How long the reports are, against the references."""
    references = result.get("reference_lengths") or []
    styled = zip(result["systems"], charts.styles(result["systems"]), strict=True)
    systems = [(system, style) for system, style in styled if system.get("lengths")]
    if not references or not systems:
        return ""
    longest = max(1, *references, *(length for system, _ in systems for length in system["lengths"]))
    panels = "".join(
        charts.histogram(label_of(system), style, system["lengths"], references, longest) for system, style in systems
    )
    lead = "Share of reports by length in words. The outline is the system, the filled shape the references."
    return section("lengths", "Report lengths", f'<div class="panels small">{panels}</div>', lead)


def examples(result: Mapping, highlight: Highlight) -> str:
    """Reference and generated reports side by side, the decisive tokens marked; the first two are open."""
    by_id: dict[str, dict[str, Any]] = {}
    for system, style in zip(result["systems"], charts.styles(result["systems"]), strict=True):
        for sample in system.get("samples") or ():
            entry = by_id.setdefault(str(sample.get("id")), {"sample": sample, "predictions": []})
            entry["predictions"].append((label_of(system), style, str(sample.get("prediction") or "")))
    if not by_id:
        return ""
    blocks = [
        _example(identifier, entry, highlight, is_open=index < 2)
        for index, (identifier, entry) in enumerate(by_id.items())
    ]
    legend = (
        '<ul class="legend" aria-label="How decisive tokens are marked">'
        '<li><mark class="present">present</mark></li><li><mark class="absent">absent</mark></li>'
        '<li><mark class="uncertain">uncertain</mark></li></ul>'
    )
    lead = (
        "Decisive tokens are marked by what the report says of the finding. Under each text: its findings that the "
        "reference states with the same polarity, those the reference does not state, and those that are missing."
    )
    return section("examples", "Example reports", legend + "".join(blocks), lead)


def _example(identifier: str, entry: Mapping, highlight: Highlight, *, is_open: bool) -> str:
    sample = entry["sample"]
    reference = str(sample.get("reference") or "")
    columns, target = "", None
    if reference:
        marked, target = highlight(reference)
        columns += f'<article class="reference"><h4>Reference</h4><p>{marked}</p></article>'
    for label, style, prediction in entry["predictions"]:
        marked, classes = highlight(prediction)
        text = marked if prediction.strip() else "<em>(empty)</em>"
        columns += f"<article><h4>{_key(style)}{escape(label)}</h4><p>{text}</p>{_tally(classes, target)}</article>"
    prompt = str(sample.get("prompt") or "")
    prompt = f'<p class="prompt"><span>Prompt</span> {escape(prompt)}</p>' if prompt else ""
    return (
        f"<details{' open' if is_open else ''}><summary><h3>{escape(identifier)}</h3></summary>"
        f'{prompt}<div class="columns">{columns}</div></details>'
    )


def _tally(classes: frozenset, target: frozenset | None) -> str:
    if target is None:
        return ""
    agree, added, missed = len(classes & target), len(classes - target), len(target - classes)
    return f'<p class="tally"><span>{agree} agree</span><span>{added} added</span><span>{missed} missing</span></p>'


def making(result: Mapping) -> str:
    """Command, settings, versions and machine, and the licence of the data."""
    blocks = []
    if result.get("command"):
        command = escape(str(result["command"]))
        blocks.append(f'<h3>To reproduce</h3><pre tabindex="0"><code>{command}</code></pre>')
    groups = [("Settings", result.get("run")), ("Machine and versions", result.get("environment"))]
    facts = "".join(f"<div><h3>{name}</h3>{_facts(values)}</div>" for name, values in groups if values)
    if facts:
        blocks.append(f'<div class="facts-grid">{facts}</div>')
    data = result.get("data") or {}
    if data.get("licence"):
        name = escape(str(data.get("name") or "The data"))
        blocks.append(
            f'<h3>Data</h3><p class="lead">{name}: {escape(str(data["licence"]))}. '
            "Prompts and references on this page are quoted from it under those terms.</p>"
        )
    return section("making", "How it was made", "".join(blocks)) if blocks else ""


def _facts(values: Mapping) -> str:
    rows = "".join(
        f"<dt>{escape(str(key).replace('_', ' '))}</dt><dd>{_fact(key, value)}</dd>" for key, value in values.items()
    )
    return f'<dl class="settings">{rows}</dl>'


def _fact(key: str, value: Any) -> str:
    if str(key).startswith("seconds") and isinstance(value, int | float):
        return seconds(value)
    if isinstance(value, Mapping):
        return escape(", ".join(f"{name} {item}" for name, item in value.items()))
    if isinstance(value, list | tuple):
        return escape(", ".join(map(str, value)))
    if value is None:
        return "–"
    return escape(f"{value:g}" if isinstance(value, float) else str(value))
