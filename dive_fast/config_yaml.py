"""YAML with the scalars of YAML 1.2, because YAML 1.1 reads 1e-3 as text and `eval_strategy: no` as false."""

import copy
import enum
import re
from typing import Any

import yaml

from dive_fast.errors import InputError


class Loader(yaml.SafeLoader):
    """SafeLoader whose scalars are those of YAML 1.2."""


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes by the same rules as `Loader` reads, and writes no anchors."""

    def ignore_aliases(self, data) -> bool:
        return True


Dumper.add_multi_representer(enum.Enum, lambda dumper, member: dumper.represent_data(member.value))
Dumper.add_multi_representer(set, lambda dumper, values: dumper.represent_list(sorted(values)))
Dumper.add_multi_representer(tuple, lambda dumper, values: dumper.represent_list(values))
MERGE = "tag:yaml.org,2002:merge"
_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_INT, _TIME = "tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp"
for _class in (Loader, Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT, _INT, _TIME)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    _class.add_implicit_resolver(_INT, re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
    _class.add_implicit_resolver(
        _FLOAT,
        re.compile(
            r"^(?:[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+0123456789."),
    )
Loader.add_constructor(_INT, lambda loader, node: int(loader.construct_scalar(node)))


def dump(values: dict) -> str:
    """`values` as text that `parse` reads back."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


def parse(text: str, source: str) -> tuple[Any, yaml.Node | None]:
    """(the document, its node tree with line numbers).

    Raises:
        InputError: headed by `source`; it is not YAML, or an anchor is used inside itself.
    """
    loader = None
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        _refuse_loops(node)
        # A copy is constructed from, since that puts merged keys (<<) among the node's own.
        return loader.construct_document(copy.deepcopy(node)), node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InputError(f"{source}: not valid YAML: {where}{error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line, character = text.count("\n", 0, error.position) + 1, chr(error.character)
        raise InputError(
            f"{source}: not valid YAML: line {line}: the character {character!r} may not stand in it; remove it"
        ) from None
    except RecursionError:
        raise InputError(f"{source}: not valid YAML: nested too deeply; take brackets or levels away") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{source}: not valid YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _refuse_loops(node: yaml.Node) -> None:
    """A value that holds itself has no end for whoever reads it."""
    done: set[int] = set()
    path: set[int] = set()

    def visit(node: yaml.Node) -> None:
        if id(node) in path:
            raise yaml.composer.ComposerError(
                None, None, "an anchor is used inside what it names; write the value out", node.start_mark
            )
        if id(node) in done or not isinstance(node, yaml.CollectionNode):
            return
        path.add(id(node))
        for value in node.value:
            visit(value[1] if isinstance(node, yaml.MappingNode) else value)
        path.remove(id(node))
        done.add(id(node))

    visit(node)
