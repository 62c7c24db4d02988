"""Tables inside a Markdown file that come from results files, so that no figure there is typed by hand.

What stands between `<!-- table: NAME FILE ... -->` and `<!-- /table -->` is replaced by the table of that name, made of
these files, whose paths start from the Markdown file's folder. Of several files the later one's records count.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dive_fast.bench import demo_tables, readme_tables
from dive_fast.bench.results import newest, parse_results
from dive_fast.bench.table import Table, markdown
from dive_fast.errors import InputError
from dive_fast.report import check_result

# Name -> what makes it: of records of the suite, or of one result of the demo or an experiment.
RECORD_TABLES: Mapping[str, Callable[[Sequence], Table | str]] = {
    "decode": readme_tables.decode,
    "decode-ratios": readme_tables.decode_ratios,
    "steering": readme_tables.steering,
    "train-step": readme_tables.train_step,
    "loss": readme_tables.loss,
    "loss-bfloat16": functools.partial(readme_tables.loss, dtype="bfloat16"),
    "loss-ratios": readme_tables.loss_ratios,
    "missed": readme_tables.missed,
    **{name: readme_tables.as_on_the_page(name) for name in ("training", "reports", "evaluate", "fits")},
}
DEMO_TABLES: Mapping[str, Callable[[Mapping], Table | str]] = {
    "demo": demo_tables.scores,
    "demo-terminal": demo_tables.terminal,
    "quality": demo_tables.quality,
    "differences": demo_tables.differences,
    "costs": demo_tables.costs,
}
BEGIN = re.compile(r"^<!-- table:(.*?)-->[ \t]*\n", re.M)
END = re.compile(r"^<!-- /table -->[ \t]*$", re.M)


def filled(text: str, source: str, read: Callable[[str], Any]) -> str:
    """`text` with every marked table made anew.

    Args:
        source: the Markdown file's name, for messages.
        read: path as written in a marker -> the JSON file's content.

    Raises:
        InputError: a marker without an end or with an unknown name, or a file that cannot give its table.
    """
    parts, done = [], 0
    for begin in BEGIN.finditer(text):
        end = END.search(text, begin.end())
        following = BEGIN.search(text, begin.end())
        line = text.count("\n", 0, begin.start()) + 1
        if end is None or (following is not None and following.start() < end.start()):
            raise InputError(f"{source}, line {line}: expected <!-- /table --> behind this <!-- table: ... -->")
        made = _made(begin[1].split(), f"{source}, line {line}", read)
        # Without the empty lines some renderers take the comment for a part of the table.
        parts += [text[done : begin.end()], f"\n{made}\n\n"]
        done = end.start()
    return "".join([*parts, text[done:]])


def _made(words: list[str], where: str, read: Callable[[str], Any]) -> str:
    known = [*RECORD_TABLES, *DEMO_TABLES]
    if len(words) < 2 or words[0] not in known:
        expected = f"expected <!-- table: NAME FILE ... --> with a NAME of {', '.join(known)}"
        raise InputError(f"{where}: {expected}; got {' '.join(words)!r}")
    name, *paths = words
    try:
        if name in DEMO_TABLES:
            content = read(paths[-1])
            check_result(content)
            made = DEMO_TABLES[name](content)
        else:
            made = RECORD_TABLES[name](newest(parse_results(read(path), path) for path in paths))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return made if isinstance(made, str) else markdown(made)
