"""Set-up's checks before it downloads, its steps' bookkeeping, and the one list of versions."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "setup_environment.py"


@pytest.fixture
def setup(monkeypatch):
    """The script as a module, with a compiler at hand and room on the disk."""
    spec = importlib.util.spec_from_file_location("setup_environment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "installed", lambda: {"mmcv": "2.1.0"})
    disk(monkeypatch, module, free=100e9)
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}")
    return module


def disk(monkeypatch, module, free):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(1e12, 1e12 - free, free))


def only_line(setup, *arguments):
    lines = list(setup.problems(*arguments))
    assert len(lines) == 1, lines
    assert "\n" not in lines[0]
    return lines[0]


def test_a_machine_that_has_everything_passes(setup):
    assert list(setup.problems()) == []


@pytest.mark.parametrize("version", [(3, 8, 18), (3, 10, 1), (3, 13, 0), (4, 0, 0)])
def test_unsupported_python_is_named(setup, monkeypatch, version):
    monkeypatch.setattr(setup.sys, "version_info", version)
    monkeypatch.setattr(setup, "THIS", "{}.{}".format(*version))
    line = only_line(setup)
    assert "{}.{}".format(*version) in line and "3.11 or 3.12" in line


def test_the_script_parses_under_an_old_python():
    """It must get far enough to say that the Python is too old."""
    import ast

    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))
    assert "from __future__" not in SCRIPT.read_text()  # annotations came with 3.7


@pytest.mark.parametrize("name", ["venv", "ensurepip"])
def test_missing_venv_is_named(setup, monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        setup.importlib.util, "find_spec", lambda asked: None if asked == name else find(asked)
    )
    assert re.search(rf"module {name};.*apt install python3\.\d+-venv", only_line(setup))


def test_missing_compiler_is_named(setup, monkeypatch):
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert "apt install g++" in only_line(setup)
    monkeypatch.setenv("CXX", "clang++ -v")
    assert "(clang++)" in only_line(setup)


def test_too_little_disk_says_how_much(setup, monkeypatch):
    monkeypatch.setattr(setup, "size_of", lambda folder: 5e9)
    disk(monkeypatch, setup, free=3e9)
    line = only_line(setup)
    assert "3.0 GB are free" in line and "12 GB" in line and "4.0 GB more" in line
    disk(monkeypatch, setup, free=7.5e9)  # with what .venv holds already it suffices
    assert list(setup.problems()) == []


def test_a_wheelhouse_that_is_no_folder_is_named(setup, tmp_path):
    assert f"WHEELHOUSE={tmp_path / 'none'} is not a folder" in only_line(setup, tmp_path / "none")


def test_headers_are_asked_for_only_where_mmcv_is_compiled(setup, monkeypatch, tmp_path):
    monkeypatch.setattr(setup.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(setup, "installed", dict)
    assert "Python.h is missing" in only_line(setup, tmp_path)
    tag = "cp{}{}".format(*sys.version_info)
    (tmp_path / f"mmcv-2.1.0-{tag}-{tag}-linux_x86_64.whl").touch()
    assert list(setup.problems(tmp_path)) == []


def test_the_problem_is_the_only_output_and_nothing_is_made(tmp_path):
    """As a newcomer meets it: a checkout, no compiler, one line, no .venv."""
    for path in ("requirements", "tools"):
        shutil.copytree(ROOT / path, tmp_path / path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = subprocess.run(
        [sys.executable, tmp_path / "tools" / SCRIPT.name],
        env={**os.environ, "PATH": str(tmp_path), "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert "setup: no C++ compiler (no-such-compiler); install one" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / ".venv").exists() and not (tmp_path / ".whl").exists()


def test_a_half_installed_package_is_installed_again(setup, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(setup, "VENV", tmp_path)
    site = tmp_path / f"lib/python{setup.THIS}/site-packages"
    for name, whole in (("Some_Thing", True), ("other", False)):
        dist_info = site / f"{name}-1.0.dist-info"
        dist_info.mkdir(parents=True)
        (dist_info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        if whole:
            (dist_info / "INSTALLER").write_text("pip\n")
    assert setup.installed() == {"some-thing": "1.0"}
    setup.forget_half_installed()
    assert [path.name for path in site.iterdir()] == ["Some_Thing-1.0.dist-info"]


def test_set_up_is_redone_when_the_lock_changes(setup, monkeypatch, tmp_path):
    lock = tmp_path / "lock.txt"
    lock.write_text("torch==2.11.0\n")
    monkeypatch.setattr(setup, "INPUTS", (lock,))
    monkeypatch.setattr(setup, "STAMP", tmp_path / "stamp")
    monkeypatch.setattr(setup, "VENV_PYTHON", Path(sys.executable))
    assert not setup.is_done()
    setup.STAMP.write_text(setup.fingerprint())
    assert setup.is_done()
    lock.write_text("torch==2.12.0\n")
    assert not setup.is_done()


def test_detectron2_is_kept_where_it_is_installed(setup, monkeypatch):
    monkeypatch.setattr(setup, "installed", lambda: {"detectron2": "0.6"})
    monkeypatch.setattr(setup, "run", lambda *command, **_: pytest.fail(f"ran {command}"))
    setup.install_detectron2()


def test_the_build_tells_its_progress_and_its_failure(setup, tmp_path, capsys):
    build = "import sys; print('[1/2] c++ a'); print('[2/2] c++ b'); sys.exit(int(sys.argv[1]))"
    command = [sys.executable, "-c", build]
    setup.run_ninja("compiling", [*command, "0"], tmp_path / "log", None)
    assert "2 of 2 files" in capsys.readouterr().out
    with pytest.raises(setup.SetupError, match="compiling failed"):
        setup.run_ninja("compiling", [*command, "1"], tmp_path / "log", None)
    assert "[2/2] c++ b" in capsys.readouterr().err


def test_the_lock_pins_what_every_extra_asks_for(setup):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = setup.locked()
    asked = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    for requirement in map(Requirement, asked):
        assert requirement.name in pins, f"{requirement} is not in the lock: make lock"
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_the_lock_holds_what_its_packages_ask_for(setup):
    """Transitively closed, so that nothing is left for next year's resolver to choose."""
    pins = setup.locked()
    for name in pins:
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            found = re.sub("[-_.]+", "-", requirement.name).lower()
            assert found in pins, f"{name} asks for {requirement}, which is not in the lock"
            assert requirement.specifier.contains(pins[found], prereleases=True), line


def test_base_install_asks_for_torch_and_timm_only():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(Requirement(line).name for line in project["dependencies"]) == ["timm", "torch"]
