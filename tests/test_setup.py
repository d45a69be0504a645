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
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from tests.support import ROOT, load_tool

SCRIPT = ROOT / "tools" / "setup_environment.py"


@pytest.fixture
def setup(monkeypatch):
    """The script as a module, with room on the disk, and nothing installed."""
    module = load_tool("setup_environment")
    monkeypatch.setattr(module, "installed", dict)
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


def test_no_compiler_is_asked_for(setup, monkeypatch):
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    monkeypatch.setattr(setup.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    assert list(setup.problems()) == list(setup.problems(None, "lite")) == []


def test_a_missing_compiler_is_named_where_mmcv_is_compiled(setup, monkeypatch, tmp_path):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(setup.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert "apt install g++" in only_line(setup, None, "compiled")
    monkeypatch.setenv("CXX", "clang++ -v")
    assert "(clang++)" in only_line(setup, None, "compiled")
    monkeypatch.setattr(setup, "installed", lambda: {"mmcv": "2.1.0"})
    assert list(setup.problems(None, "compiled")) == []


def test_an_unknown_mmcv_is_named(setup):
    assert only_line(setup, None, "full") == "MMCV=full: lite and compiled are valid"


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
    assert "Python.h is missing" in only_line(setup, tmp_path, "compiled")
    (tmp_path / mmcv_wheel()).touch()
    assert list(setup.problems(tmp_path, "compiled")) == []


def mmcv_wheel():
    tag = "cp{}{}".format(*sys.version_info)
    return f"mmcv-2.1.0-{tag}-{tag}-linux_x86_64.whl"


@pytest.fixture
def calls(setup, monkeypatch):
    """What the script would have had uv do."""
    made = []
    monkeypatch.setattr(setup, "uv", lambda *arguments, env=None: made.append(arguments))
    return made


@pytest.mark.parametrize(
    "have, wanted, removed",
    [
        ({}, "lite", None),
        ({}, "compiled", None),
        ({"mmcv": "2.1.0"}, "lite", "mmcv"),
        ({"mmcv-lite": "2.1.0"}, "compiled", "mmcv-lite"),
        ({"mmcv": "2.0.1"}, "compiled", "mmcv"),
    ],
)
def test_one_mmcv_takes_the_others_place(
    setup, monkeypatch, calls, tmp_path, have, wanted, removed
):
    """Both write the same folder: the one that goes, goes first."""
    monkeypatch.setattr(setup, "installed", lambda: have)
    (tmp_path / mmcv_wheel()).touch()
    setup.install_mmcv(wanted, tmp_path)
    assert [call[0] for call in calls] == ["uninstall", "install"][0 if removed else 1 :]
    assert calls[0][-1] == removed or not removed
    assert calls[-1][-1] == {"lite": "mmcv-lite==2.1.0", "compiled": "mmcv==2.1.0"}[wanted]


@pytest.mark.parametrize("variant", ["lite", "compiled"])
def test_an_mmcv_that_is_there_stays(setup, monkeypatch, calls, variant):
    monkeypatch.setattr(setup, "installed", lambda: {setup.VARIANTS[variant]: "2.1.0"})
    assert setup.installed_variant() == variant
    setup.install_mmcv(variant, None)
    assert calls == []


def test_what_is_done_is_done_for_either_mmcv_unless_one_is_named(setup, monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "STAMP", tmp_path / "stamp")
    monkeypatch.setattr(setup, "VENV_PYTHON", Path(sys.executable))
    setup.STAMP.write_text(setup.fingerprint("compiled"))
    assert setup.is_done() and setup.is_done("compiled") and not setup.is_done("lite")


def test_uv_looks_where_pip_does(setup, monkeypatch, tmp_path):
    """Its own settings come first, and pip's variables before pip's files."""
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://one.example/simple\ncert = /some/bundle.crt\n"
        "extra-index-url = https://two.example/simple\n    https://three.example/simple\n"
    )
    monkeypatch.setattr(setup, "VENV_PYTHON", Path(sys.executable))
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_FIND_LINKS", "/a /b")
    for name in ("PIP_CERT", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    expected = {
        "UV_DEFAULT_INDEX": "https://one.example/simple",
        "UV_INDEX": "https://two.example/simple https://three.example/simple",
        "UV_FIND_LINKS": "/a,/b",
        "SSL_CERT_FILE": "/some/bundle.crt",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    assert setup.pips_index() == expected
    monkeypatch.setenv("PIP_INDEX_URL", "https://four.example/simple")
    assert setup.pips_index()["UV_DEFAULT_INDEX"] == "https://four.example/simple"
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://five.example/simple")
    ran = []
    monkeypatch.setattr(setup, "run", lambda *command, env: ran.append(env))
    setup.uv("install", "something")
    assert ran[0]["UV_DEFAULT_INDEX"] == "https://five.example/simple"
    assert ran[0]["UV_FIND_LINKS"] == "/a,/b"


def test_the_problem_is_the_only_output_and_nothing_is_made(tmp_path):
    """As a newcomer meets it: a checkout, no compiler, one line, no .venv."""
    for path in ("requirements", "tools", "dense/openmmlab"):
        shutil.copytree(ROOT / path, tmp_path / path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    env = {**os.environ, "PATH": str(tmp_path), "CXX": "no-such-compiler", "MMCV": "compiled"}
    env.pop("WHEELHOUSE", None)  # a wheel of mmcv in it would need no compiler
    done = subprocess.run(
        [sys.executable, tmp_path / "tools" / SCRIPT.name],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert "no C++ compiler (no-such-compiler); install one" in done.stderr
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
    setup.STAMP.write_text(setup.fingerprint("lite"))
    assert setup.is_done()
    lock.write_text("torch==2.12.0\n")
    assert not setup.is_done()


def test_detectron2_is_kept_where_it_is_installed(setup, monkeypatch):
    monkeypatch.setattr(setup, "installed", lambda: {"detectron2": "0.6"})
    monkeypatch.setattr(setup, "run", lambda *command, **_: pytest.fail(f"ran {command}"))
    setup.install_detectron2()


def test_the_build_tells_its_progress_and_its_failure(setup, tmp_path, capsys, monkeypatch):
    build = "import sys; print('[1/4] c++ a'); print('[3/4] c++ b'); sys.exit(int(sys.argv[1]))"
    command = [sys.executable, "-c", build]
    # At the start, then at each line and as it is printed.
    clock = iter([100.0, 130.0, 130.0, 340.0, 340.0])
    with monkeypatch.context() as patched:
        # subprocess has its own name of the clock.
        patched.setattr(setup, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        setup.run_ninja("compiling", [*command, "0"], tmp_path / "log", None)
    # Nothing is known of the first; then 240 seconds for two files, and one is left.
    said = capsys.readouterr().out.splitlines()
    assert [line.partition("]")[2] for line in said] == [
        "   1 of 4 files, about 2 min left",
        "   3 of 4 files, about 2 min left",
    ]
    assert (tmp_path / "log").read_text() == "[1/4] c++ a\n[3/4] c++ b\n"
    with pytest.raises(setup.SetupError, match="compiling failed"):
        setup.run_ninja("compiling", [*command, "1"], tmp_path / "log", None)
    assert "[3/4] c++ b" in capsys.readouterr().err
    # Of a long log the end is shown; what is no number of files is no progress.
    build = "import os; [print(os.environ['WORD'], n) for n in range(40)]; exit('[x/4]')"
    with pytest.raises(setup.SetupError):
        environ = {**os.environ, "WORD": "line"}
        setup.run_ninja("compiling", [sys.executable, "-c", build], tmp_path / "log", environ)
    said = capsys.readouterr()
    assert said.out == "" and said.err.split("\n")[:-2] == [
        *(f"line {n}" for n in range(11, 40)),
        "[x/4]",
    ]


def test_the_lock_pins_what_every_extra_asks_for(setup):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins, extras = setup.locked(), project["optional-dependencies"]
    others = read_pins(ROOT / "requirements/ecosystem.txt")
    for held, asked in (
        (others, project["dependencies"] + extras.pop("ecosystem")),
        (pins, project["dependencies"] + sum(extras.values(), [])),
    ):
        for requirement in map(Requirement, asked):
            assert requirement.name in held, f"{requirement} is not in the lock: make lock"
            assert requirement.specifier.contains(held[requirement.name]), requirement
    assert all(others[name] == pins[name] for name in others.keys() & pins.keys())


def read_pins(path):
    return dict(re.findall(r"^([\w.-]+)==(\S+)", path.read_text(), re.M))


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


def test_no_extra_pulls_one_mmcv_over_the_other():
    """mmcv and mmcv-lite write the same folder: which of them it is, the user has chosen."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    names = {Requirement(line).name for lines in extras.values() for line in lines}
    assert not {"mmcv", "mmcv-lite"} & names
