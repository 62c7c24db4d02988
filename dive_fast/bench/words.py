"""Problems' names as people say them."""

from dive_fast.bench.results import Record


def decode_words(record: Record) -> str:
    """smollm2-bfloat16-B8 as people say it."""
    backbone, dtype, rows = record.get("problem").rsplit("-", 2)
    return f"{backbone}, {dtype}, {rows[1:]} row{'s' * (rows != 'B1')}"


def step_words(record: Record) -> str:
    """cpu-smollm2-float32-batch8-open_i and the scope, in two lines."""
    device, rest = record.get("problem").split("-", 1)
    backbone, dtype, batch, prompt = rest.rsplit("-", 3)
    prompts = f"prompts of {prompt[6:]}" if prompt.startswith("prompt") else "Open-i"
    scope = record.get("implementation").removeprefix("dive_fast ")
    return f"{backbone}, {dtype}, {batch[5:]} reports, {prompts}, {device}\n{scope}"
