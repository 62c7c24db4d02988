"""The diagnosis against independent sources, and against machines made up for the purpose."""

import importlib.metadata
import io
import json
import os
import stat
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from dive_fast import doctor, native

OK = {"ok": True, "message": ""}


@pytest.fixture(scope="module")
def diagnosis():
    return doctor.diagnose()


def rendered(diagnosis: dict) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    doctor.render(diagnosis, console)
    return console.file.getvalue()


def extension_with(devices: list[dict], probe=lambda index: {"status": OK, "elements": 5}, error: str = ""):
    """A stand-in for dive_fast._native on a machine with these CUDA devices."""
    listed = {"status": {"ok": not error, "message": error}, "devices": devices}
    return SimpleNamespace(
        __version__="0.0.0",
        cpu=SimpleNamespace(
            brand=lambda: "Invented Processor",
            instruction_sets=lambda: ["avx2", "fma"],
            kernel_levels=lambda: ["portable"],
            bf16_products_are_quick=lambda: False,
            cores=lambda: {"logical": 8, "physical": 4},
        ),
        cuda=SimpleNamespace(
            built=lambda: True,
            built_archs=lambda: ["80", "90a"],
            versions=lambda: {"status": OK, "runtime": 13000, "driver": 12080},
            devices=lambda: listed,
            probe=probe,
        ),
    )


def device(index: int, covered: dict = OK) -> dict:
    return {
        "index": index,
        "name": f"Invented GPU {index}",
        "capability": (7, 5),
        "total_memory": 16 * 2**30,
        "sm_count": 40,
        "covered": covered,
    }


def test_versions_are_those_of_the_installed_distributions(diagnosis):
    for name in ("torch", "transformers", "peft", "numpy"):
        assert diagnosis["packages"][name] == importlib.metadata.version(name)
    assert diagnosis["python"] == sys.version.split()[0]


def test_diagnosis_survives_json(diagnosis):
    assert json.loads(json.dumps(diagnosis)) == diagnosis


@pytest.mark.skipif(sys.platform != "linux", reason="compares with /proc/meminfo")
def test_memory_is_the_kernels(diagnosis):
    with open("/proc/meminfo") as file:
        kib = int(file.readline().split()[1])
    assert diagnosis["memory"]["total"] == kib * 1024


def test_everything_found_appears_in_the_tables(diagnosis):
    text = rendered(diagnosis)
    for name, version in diagnosis["packages"].items():
        assert name in text and (version is None or version in text)
    assert " ".join(diagnosis["cpu"]["instruction_sets"]) in text
    for name in doctor.EXTRAS:
        assert name in text


def test_a_missing_extension_is_a_problem_not_a_crash(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "dive_fast._native", None)
    found = doctor.diagnose()
    assert found["extension"]["built"] is False and found["cpu"] == {} and found["cuda"] == {}
    assert "pip install" in rendered(found)
    assert any("_native" in problem for problem in doctor.problems(found))
    assert doctor.main() == 1
    assert "problem: " in capsys.readouterr().out


def test_a_missing_extra_names_its_command(monkeypatch):
    find_spec = doctor.importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find_spec(name, *rest)
    )
    found = doctor.diagnose()
    assert found["extras"]["demo"]["missing"] == ["gguf"]
    assert "missing gguf: pip install 'dive_fast[demo]'" in rendered(found)
    assert not any("gguf" in problem for problem in doctor.problems(found))


def test_a_missing_requirement_is_a_problem(diagnosis):
    found = diagnosis | {"packages": {"peft": None}}
    assert "peft is not installed" in doctor.problems(found)
    assert "missing: pip install peft" in rendered(found)


def test_devices_say_whether_this_build_covers_them(monkeypatch):
    uncovered = {"ok": False, "message": "no kernel image [for sm_75]"}
    monkeypatch.setattr(native, "load", lambda: extension_with([device(0), device(1, uncovered)]))
    text = rendered(doctor.diagnose())
    assert "archs 80 90a, runtime 13.0, driver 12.8" in text
    assert "Invented GPU 0, 7.5, 16.0 GiB, 40 SMs, covered by this build" in text
    assert "not covered: no kernel image [for sm_75]" in text
    assert "4 physical, 8 logical" in text


def test_a_probe_must_find_a_device_and_pass_on_all(monkeypatch, capsys):
    monkeypatch.setattr(native, "load", lambda: extension_with([], error="no CUDA driver is installed"))
    assert doctor.problems(doctor.diagnose(), probe=False) == []
    assert doctor.problems(doctor.diagnose(True), probe=True) == ["nothing to probe: no CUDA driver is installed"]
    assert doctor.main(probe=True) == 1

    monkeypatch.setattr(native, "load", lambda: extension_with([device(0)]))
    assert doctor.main(probe=True) == 0
    assert "probe passed" in capsys.readouterr().out

    broken = {"status": {"ok": False, "message": "launch failed"}, "elements": 0}
    second_broken = extension_with(
        [device(0), device(1)], probe=lambda index: broken if index else {"status": OK, "elements": 5}
    )
    monkeypatch.setattr(native, "load", lambda: second_broken)
    assert doctor.problems(doctor.diagnose(True), probe=True) == ["probe of device 1: launch failed"]
    assert "probe failed: launch failed" in rendered(doctor.diagnose(True))


def test_main_prints_json_with_the_problems(monkeypatch, capsys):
    monkeypatch.setattr(native, "load", lambda: extension_with([]))
    assert doctor.main(json=True) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


@pytest.mark.parametrize(
    ("script", "version", "error"),
    [
        ("echo 'Picked up options: version' >&2; echo 'openjdk version 17.0.1' >&2", "openjdk version 17.0.1", None),
        ("echo broken >&2; exit 3", None, "broken"),
        (None, None, "no java on PATH"),
    ],
)
def test_java(monkeypatch, tmp_path, script, version, error):
    if script is not None:
        executable = tmp_path / "java"
        executable.write_text(f"#!/bin/sh\n{script}\n")
        executable.chmod(executable.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setitem(os.environ, "PATH", str(tmp_path))
    found = doctor.diagnose()["java"]
    assert found["version"] == version
    assert (error is None and found["error"] is None) or error in found["error"]
