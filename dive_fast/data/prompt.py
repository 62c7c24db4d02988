"""How a record's prompt is worded, the same in every data set so that an adapter carries over."""

from collections.abc import Iterable

FINDINGS_REQUEST = "Describe the findings of the chest X-ray."
IMPRESSION_REQUEST = "Write the impression of the chest X-ray."


def collapse(text: str | None) -> str:
    """`text` with every run of white space as one blank, none at the ends; "" for None."""
    return " ".join(text.split()) if text else ""


def compose_prompt(parts: Iterable[tuple[str, str]], request: str) -> str:
    """One "Name: value" line per part that has a value, then the request."""
    return "\n".join([*(f"{name}: {value}" for name, value in parts if value), request])
