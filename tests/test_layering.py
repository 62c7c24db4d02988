"""Imports run one way. A new edge between rooms is a decision: it is made here, in ALLOWED, or not at all."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dive_fast"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Vocabulary rather than machinery: any room may speak of these.
COMMON = {"errors", "data.record", "supervision.tagger"}

LOWER = {"native", "devices", "models", "ops", "steering", "supervision", "data", "decode", "metrics", "clinical"}
UPPER = {"train", "evaluate", "likelihood", "prompt_store", "run_settings"}

# Room -> the rooms, or single modules of a room, that it may import besides itself and COMMON.
ALLOWED = {
    "errors": set(),
    "lazy": set(),
    "native": set(),
    "devices": set(),
    # what the processor is quick at decides a backbone's dtype
    "models": {"native"},
    "ops": {"native"},
    "steering": {"models", "ops"},
    # the plan takes the adapter's weights and the positions they apply to; inputs may be records
    "decode": {"native", "models", "ops", "steering", "data"},
    # the teacher is a model that is run: its contexts are made of records, its statistics are a function of the loss op
    # and a tagger marks what RadGraph's annotator finds
    "supervision": {"ops", "data", "models", "clinical"},
    "data": set(),
    # models that read reports: RadGraph and CheXbert F1 score by what they find
    "metrics": {"clinical"},
    # below both of its users, so that neither imports the other
    "clinical": {"devices"},
    "prompt_store": {"models", "data"},
    "likelihood": LOWER | {"prompt_store"},
    "evaluate": LOWER | {"likelihood"},
    # whether a folder's files were made with the same settings, asked wherever work goes on
    "run_settings": set(),
    # tags the records of a data set, which `data` itself cannot: the supervision room reads records
    "inspect_data": {"data", "supervision"},
    # the rows that one process and every worker write alike
    "predictions": {"data", "decode"},
    # what names an image that lies in a data set
    "shards": {"data.images", "run_settings"},
    # a worker loads model and adapter as the command line does
    "distributed": {"models", "predictions", "shards", "train"},
    "train": LOWER | UPPER,
    "doctor": {"native"},
    "config": LOWER | UPPER,
    "report": LOWER | UPPER,
    # what demo and experiment measure of a system alike
    "measurements": LOWER | UPPER,
    "demo": LOWER | UPPER | {"measurements", "report", "doctor", "config"},
    # its own rows are files of their own (`shards` names their records), each seeded like those of `generate`
    "experiment": LOWER | UPPER | {"measurements", "report", "doctor", "config", "predictions", "shards"},
    "cli": LOWER
    | UPPER
    | {"report", "doctor", "config", "demo", "inspect_data", "predictions", "distributed", "experiment", "bench"},
    # reads results files alone; the page looks like the other one
    "bench": {"report"},
    "__main__": {"cli"},
    "__init__": LOWER | UPPER | {"lazy"},
}

# Only inside a function, so that the room can be used without what is imported.
ALLOWED_LAZILY = {"metrics": {"supervision.lexicon"}}

# Modules and folders that belong to the room beside them.
PART_OF = {
    "adapters": "train",
    "arguments": "train",
    "checkpoints": "train",
    "eval_reports": "train",
    "sharding": "train",
    "trainer": "train",
    "report_assets": "report",
    "cli_bench": "cli",
    "cli_commands": "cli",
    "cli_data": "cli",
    "cli_experiment": "cli",
    "cli_files": "cli",
    "config_values": "config",
    "config_yaml": "config",
}

OPTIONAL = ("triton", "datasets", "matplotlib", "pycocoevalcap", "radgraph", "ray")


class Import(NamedTuple):
    """`file` imports `target` (dotted, without the leading "dive_fast."); lazily means inside a function."""

    file: str
    line: int
    target: str
    lazily: bool


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(path: Path) -> list[str]:
    parts = ["dive_fast", *path.relative_to(PACKAGE).with_suffix("").parts]
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts


def statements(tree: ast.AST, lazily: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    for node in ast.iter_child_nodes(tree):
        yield node, lazily
        inside = lazily or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from statements(node, inside)


def is_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists() or dotted == "dive_fast._native"


def absolute_targets(node: ast.AST, path: Path) -> list[str]:
    """Fully dotted modules that a statement imports; `from a import b` is a.b where that is a module."""
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
            return [name]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = ["dive_fast", *path.relative_to(PACKAGE).parent.parts]
        base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
    return [f"{base}.{a.name}" if is_module(f"{base}.{a.name}") else base for a in node.names]


def imports_within(path: Path, text: str | None = None) -> list[Import]:
    tree = parse(path) if text is None else ast.parse(text)
    found = []
    for node, lazily in statements(tree):
        for target in absolute_targets(node, path):
            if target == "dive_fast" or target.startswith("dive_fast."):
                name = str(path.relative_to(ROOT))
                found.append(Import(name, node.lineno, target.removeprefix("dive_fast").lstrip("."), lazily))
    return found


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return PART_OF.get(first, first)


def covers(entries: set[str], target: str) -> bool:
    return any(target == entry or target.startswith(entry + ".") for entry in entries)


def violations(path: Path, text: str | None = None) -> list[str]:
    room = room_of(path)
    wrong = []
    for found in imports_within(path, text):
        first, *rest = found.target.split(".")
        target = ".".join([PART_OF.get(first, first), *rest])
        if target == "_native":
            fine = room == "native"
        elif target == "":
            # the root's public names sit on everything, so only what sits on them may ask for them
            fine = room in ("demo", "cli", "__main__")
        else:
            allowed = {room} | COMMON | ALLOWED[room]
            fine = covers(allowed, target) or (found.lazily and covers(ALLOWED_LAZILY.get(room, set()), target))
        if not fine:
            wrong.append(f"{found.file}:{found.line}: {room} must not import dive_fast.{found.target}")
    return wrong


def test_every_room_has_its_line_in_the_table():
    assert {room_of(path) for path in SOURCES} <= set(ALLOWED)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    assert violations(path) == []


@pytest.mark.parametrize(
    ("file", "text", "count"),
    [
        ("ops/new.py", "from dive_fast.steering import DiveConfig", 1),
        ("ops/new.py", "from ..steering.config import DiveConfig", 1),
        ("ops/new.py", "from dive_fast import train", 1),
        ("ops/new.py", "import dive_fast", 1),
        ("ops/new.py", "def f():\n    from dive_fast import evaluate", 1),
        ("ops/new.py", "import importlib\nimportlib.import_module('dive_fast.train')", 1),
        ("ops/new.py", "from dive_fast import native\nfrom . import backend\nfrom dive_fast.errors import A", 0),
        ("train.py", "from dive_fast.checkpoints import save\nfrom dive_fast.cli_files import read", 1),
        ("decode/plan.py", "from dive_fast import _native", 1),
        ("metrics/new.py", "from dive_fast.supervision.lexicon import LexiconTagger", 1),
        ("metrics/new.py", "def f():\n    from dive_fast.supervision.lexicon import LexiconTagger", 0),
        ("metrics/new.py", "def f():\n    from dive_fast.supervision import teacher", 1),
        ("data/new.py", "from dive_fast.supervision.tagger import Span", 0),
        ("evaluate.py", "from dive_fast.train import train", 1),
        ("evaluate.py", "from dive_fast.report_assets import charts", 1),
    ],
)
def test_the_guard_sees_a_wrong_import(file, text, count):
    assert len(violations(PACKAGE / file, text)) == count


def test_tests_import_their_helpers_from_the_package_tests():
    """Under a bare name, or without `tests/__init__.py`, another distribution's module of that name may be found."""
    assert (ROOT / "tests" / "__init__.py").is_file()
    files = sorted((ROOT / "tests").glob("*.py"))
    names = {path.stem for path in files}
    for path in files:
        for node, _ in statements(parse(path)):
            bare = [target for target in absolute_targets(node, PACKAGE) if target.split(".")[0] in names]
            assert not bare, f"{path.name}, line {node.lineno}: import {bare[0]} from tests"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_packages_are_imported_where_they_are_used(path):
    # Triton's kernels are decorated at import, so their own modules are where it belongs; nothing else imports those.
    holds_kernels = room_of(path) == "ops" and path.name.startswith("triton")
    for node, lazily in statements(parse(path)):
        for target in absolute_targets(node, path):
            package, module = target.split(".")[0], target.split(".")[-1]
            optional = package in OPTIONAL or (package == "dive_fast" and module.startswith("triton"))
            assert lazily or holds_kernels or not optional, f"line {node.lineno} imports {target}"


def test_importing_the_package_leaves_optional_packages_alone(tmp_path):
    # Libraries import `datasets` where they find it, so one that is not installed gets a stand-in with metadata. Not so
    # triton: torch._dynamo wants the real one, and an import of our own would fail without it.
    for name in set(OPTIONAL) - {"triton"}:
        if importlib.util.find_spec(name) is None:
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("__version__ = '99.0'\n")
            metadata = tmp_path / f"{name}-99.0.dist-info" / "METADATA"
            metadata.parent.mkdir()
            metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n")
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import dive_fast
print(*(name for name in {OPTIONAL!r} if name in sys.modules))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def looks_up_environment(text: str) -> list[int]:
    """Lines that read one environment variable. Handing the whole environment to a child process is not that."""
    lines = []
    tree = ast.parse(text)
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=ast.Attribute(attr="environ"), ctx=ast.Load()):
                lines.append(node.lineno)
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="environ"), attr="get" | "setdefault" | "pop")):
                lines.append(node.lineno)
            case ast.Compare(comparators=[ast.Attribute(attr="environ")]):
                lines.append(node.lineno)
            case ast.Attribute(value=ast.Name(id="os"), attr="getenv" | "environb" | "getenvb"):
                lines.append(node.lineno)
            case ast.ImportFrom(module="os", names=names) if any("env" in alias.name for alias in names):
                lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_is_switched_by_the_environment(path):
    assert looks_up_environment(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("import os\nos.environ['A']", 1),
        ("import os\nos.environ.get('A')", 1),
        ("import os\n'A' in os.environ", 1),
        ("import os\nos.getenv('A')", 1),
        ("from os import environ", 1),
        ("import os\nrun(env={**os.environ, 'A': '1'})", 0),
        ("import os\nrun(env=os.environ | {'A': '1'})", 0),
    ],
)
def test_the_guard_sees_an_environment_variable(text, count):
    assert len(looks_up_environment(text)) == count


def test_the_extension_knows_neither_torch_nor_the_environment_and_binds_in_one_place():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cuh", ".cpp", ".cu"}]
    assert sources
    include = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.M)
    for path in sources:
        text = path.read_text(encoding="utf-8")
        headers = include.findall(text)
        assert not [h for h in headers if h.split("/")[0] in ("torch", "ATen", "c10", "caffe2")], path
        assert path.parent.name == "bindings" or not [h for h in headers if h.startswith(("pybind11", "Python"))], path
        assert "getenv" not in text, path
