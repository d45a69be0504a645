"""Set-up from nothing, from a half and from a whole one: every command that it would run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support import ROOT, load_tool

LOCK = """torch==2.11.0 \\
    --hash=sha256:00
pip==26.0
setuptools==81.0.0
wheel==0.46
uv==0.9.1
mmcv-lite==2.1.0
opencv-python-headless==4.13.0
"""
LAYOUT = ("lib", "python{}.{}".format(*sys.version_info), "site-packages")


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """The script as a module of a checkout of its own, with nothing installed; nothing runs."""
    module = load_tool("setup_environment")
    root = tmp_path / "checkout"
    (root / "requirements").mkdir(parents=True)
    (root / "requirements/lock.txt").write_text(LOCK)
    (root / "requirements/detectron2.txt").write_text("sal-detectron2==0.6.1 --hash=sha256:00\n")
    venv = root / ".venv"
    for name, value in {
        "ROOT": root,
        "VENV": venv,
        "VENV_PYTHON": venv / "bin/python",
        "UV": venv / "bin/uv",
        "STAMP": venv / ".setup-done",
        "BUILT": root / ".whl",
        "LOCK": root / "requirements/lock.txt",
        "DETECTRON2": root / "requirements/detectron2.txt",
        "INPUTS": (root / "requirements/lock.txt", root / "requirements/detectron2.txt"),
        "pips_index": lambda: {"UV_DEFAULT_INDEX": "https://one.example"},
        "problems": lambda *given: (),
    }.items():
        monkeypatch.setattr(module, name, value)
    for name in ("TMPDIR", "FORCE_CUDA", "MAX_JOBS", "UV_DEFAULT_INDEX"):
        # Set first, so that what the script sets is taken back.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return module


class Calls(list):
    """In place of subprocess.call: writes commands down, and leaves the files that they would."""

    def __init__(self, setup):
        super().__init__()
        self.setup, self.fail = setup, None
        self.options: list[dict] = []
        self.packed = ""

    def __call__(self, command, **options) -> int:
        setup, root = self.setup, str(self.setup.ROOT)
        assert all(isinstance(word, str) for word in command)
        self.append(" ".join(command).replace(root, "ROOT"))
        self.options.append(options)
        if self.fail and self.fail in self[-1]:
            return 3
        if "venv" in command:
            setup.VENV_PYTHON.parent.mkdir(parents=True)
            setup.VENV_PYTHON.touch()
            setup.VENV.joinpath(*LAYOUT).mkdir(parents=True)
        elif "download" in command:
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            self.download(folder, command[-1])
        elif "unpack" in command:
            tree = Path(command[command.index("--dest") + 1], "sal_detectron2-0.6.1")
            (tree / "detectron2").mkdir(parents=True)
            (tree / "detectron2/_C.cpython-310.so").touch()
            (tree / "sal_detectron2-0.6.1.dist-info").mkdir()
            (tree / "sal_detectron2-0.6.1.dist-info/WHEEL").write_text(
                "Wheel-Version: 1.0\n\nTag: cp310-cp310-linux\nTag: cp310-abi3-linux\n"
            )
        elif "pack" in command:
            tree = Path(command[-1])
            assert not list(tree.glob("detectron2/*.so"))
            self.packed = (tree / "sal_detectron2-0.6.1.dist-info/WHEEL").read_text()
            folder = Path(command[command.index("--dest-dir") + 1])
            (folder / "sal_detectron2-0.6.1-py3-none-any.whl").write_text("repacked")
        return 0

    def download(self, folder: Path, what: str) -> None:
        if what.startswith("mmcv=="):
            name = what.replace("==", "-")
            (folder / name).mkdir()
            (folder / name / "setup.py").touch()
            shutil.make_archive(str(folder / name), "gztar", folder, name)
            shutil.rmtree(folder / name)
        else:
            (folder / "sal_detectron2-0.6.1-cp310-cp310-linux.whl").touch()


@pytest.fixture
def calls(setup, monkeypatch):
    made = Calls(setup)
    monkeypatch.setattr(setup.subprocess, "call", made)
    return made


def installs(setup, **versions: str) -> None:
    """Have packages in .venv."""
    for name, version in versions.items():
        folder = setup.VENV.joinpath(*LAYOUT, f"{name}-{version}.dist-info")
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        (folder / "INSTALLER").write_text("uv\n")


PIP, UV = "ROOT/.venv/bin/python -m pip", "ROOT/.venv/bin/uv pip"
UV_INSTALL = f"{UV} install --python ROOT/.venv/bin/python"
BASE = getattr(sys, "_base_executable", sys.executable)
WHEELS = " --find-links ROOT/wheels"
REPACKED = [
    f"{PIP} download --quiet --no-deps --only-binary=:all: --python-version=3.10"
    " --implementation=cp --abi=none --platform=any --require-hashes --requirement"
    " ROOT/requirements/detectron2.txt --dest ROOT/.whl/detectron2",
    "ROOT/.venv/bin/python -m wheel unpack --dest ROOT/.whl/detectron2"
    " ROOT/.whl/detectron2/sal_detectron2-0.6.1-cp310-cp310-linux.whl",
    "ROOT/.venv/bin/python -m wheel pack --dest-dir ROOT/.whl/detectron2"
    " ROOT/.whl/detectron2/sal_detectron2-0.6.1",
]


def expected(variant: str, wheels: str) -> list[str]:
    mmcv = "--no-index --only-binary=mmcv" if variant == "compiled" else ""
    name = {"lite": "mmcv-lite", "compiled": "mmcv"}[variant]
    script = ROOT / "tools/setup_environment.py"
    return [
        f"{BASE} -m venv --clear ROOT/.venv",
        f"{PIP} install --quiet --retries=2 pip==26.0 setuptools==81.0.0 wheel==0.46 uv==0.9.1",
        f"{UV_INSTALL} --no-deps --no-build-isolation{wheels} torch==2.11.0 pip==26.0"
        " setuptools==81.0.0 wheel==0.46 uv==0.9.1",
        f"{UV_INSTALL} --quiet --no-deps --reinstall opencv-python-headless==4.13.0",
        " ".join(f"{UV_INSTALL} --quiet --no-deps {mmcv} {wheels} {name}==2.1.0".split()),
        *REPACKED,
        f"{UV_INSTALL} --quiet --no-deps --no-index"
        " ROOT/.whl/sal_detectron2-0.6.1-py3-none-any.whl",
        f"{UV_INSTALL} --quiet --no-deps --no-build-isolation --editable ROOT",
        *(["ROOT/.venv/bin/python -m dense.openmmlab.mmcv_lite"] if variant == "lite" else []),
        f"{PIP} check",
        f"ROOT/.venv/bin/python {script} versions",
    ]


@pytest.mark.parametrize("wheelhouse", [None, "wheels"])
@pytest.mark.parametrize("variant", [None, "lite", "compiled"])
def test_from_nothing(setup, calls, variant, wheelhouse, monkeypatch, capsys):
    (setup.ROOT / "wheels").mkdir()
    tag = "cp{}{}".format(*sys.version_info)
    if variant == "compiled":
        # Where no folder is named, one that was compiled before.
        folder = setup.ROOT / (wheelhouse or ".whl/torch-2.11.0-cpu")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"mmcv-2.1.0-{tag}-{tag}-linux_x86_64.whl").touch()
    monkeypatch.chdir(setup.ROOT)
    setup.set_up(wheelhouse, variant)
    wheels = WHEELS if wheelhouse else ""
    todo = expected(variant or "lite", wheels)
    if variant == "compiled" and not wheelhouse:
        todo[4] = todo[4].replace(
            "mmcv mmcv==", "mmcv --find-links ROOT/.whl/torch-2.11.0-cpu mmcv=="
        )
    assert calls == todo
    assert calls.packed == "Wheel-Version: 1.0\nTag: py3-none-any\n"
    assert os.environ["TMPDIR"] == str(setup.VENV / "tmp")
    left = [path.name for path in sorted(setup.VENV.iterdir())]
    assert left == [".setup-done", "bin", "lib"]
    assert not (setup.BUILT / "detectron2").exists()
    quiet = [options.get("stdout") == subprocess.DEVNULL for options in calls.options]
    assert [" -m wheel " in command for command in calls] == quiet
    for command, options in zip(calls, calls.options, strict=True):
        if " pip install --python" in command:
            assert options["env"]["UV_DEFAULT_INDEX"] == "https://one.example"
        ignored = (options.get("env") or {}).get("PYTHONWARNINGS") == "ignore"
        assert ignored == ("--editable" in command)
    said = [line.partition("] ")[2] for line in capsys.readouterr().out.splitlines()]
    name = {"lite": "mmcv-lite", "compiled": "mmcv"}[variant or "lite"]
    assert said == [
        *("build tools", "5 packages, 3 GB to download", "the headless cv2", f"{name} 2.1.0"),
        *("detectron2", "dense-backbones itself", "importing all packages for the first time"),
        f"done, {setup.VENV} is ready, {setup.MMCV_IS[variant or 'lite']}",
    ]
    # A second one does nothing; the other mmcv is work.
    setup.set_up(wheelhouse, variant)
    assert calls == todo
    assert setup.is_done(variant or "lite")
    assert not setup.is_done({"compiled": "lite"}.get(variant, "compiled"))
    setup.VENV_PYTHON.unlink()
    assert not setup.is_done(variant)


def test_what_another_set_up_did_meanwhile_is_not_done_again(setup, calls, monkeypatch):
    locks, done = [], iter([False, True])
    monkeypatch.setattr(setup.fcntl, "flock", lambda file, kind: locks.append(kind))
    monkeypatch.setattr(setup, "is_done", lambda variant: next(done))
    setup.set_up(None, None)
    assert calls == [] and locks == [setup.fcntl.LOCK_EX]


def test_what_is_there_stays(setup, calls, monkeypatch):
    """Of everything but one package, one build tool and the importing."""
    (setup.VENV / "bin").mkdir(parents=True)
    setup.VENV_PYTHON.touch()
    version = "{}.{}".format(*sys.version_info)
    (setup.VENV / "pyvenv.cfg").write_text(f"home = /usr\nversion = {version}.7\n")
    installs(setup, torch="2.10.0", pip="26.0", setuptools="81.0.0", wheel="0.45", uv="0.9.1")
    installs(setup, mmcv="2.1.0", sal_detectron2="0.6.1")
    (setup.VENV.joinpath(*LAYOUT) / "cv2").mkdir()
    (setup.VENV.joinpath(*LAYOUT) / "cv2/version.py").write_text("headless = True\n")
    broken = setup.VENV.joinpath(*LAYOUT) / "half-1.0.dist-info"
    broken.mkdir()
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    setup.set_up(None, None)
    assert calls == [
        f"{PIP} --version",
        f"{PIP} install --quiet --retries=2 wheel==0.46",
        f"{UV_INSTALL} --no-deps --no-build-isolation torch==2.11.0 wheel==0.46",
        f"{UV_INSTALL} --quiet --no-deps --no-build-isolation --editable ROOT",
        f"{PIP} check",
        f"ROOT/.venv/bin/python {ROOT / 'tools/setup_environment.py'} versions",
    ]
    # The installed mmcv decides.
    assert setup.is_done("compiled") and not broken.exists()
    assert os.environ["TMPDIR"] == "/elsewhere"
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert calls.options[0] == silent


@pytest.mark.parametrize("wrong", ["version", "pip", "config"])
def test_a_broken_venv_is_built_anew(setup, calls, wrong, capsys):
    setup.VENV.mkdir()
    version = "3.9" if wrong == "version" else "{}.{}".format(*sys.version_info)
    if wrong != "config":
        (setup.VENV / "pyvenv.cfg").write_text(f"version = {version}.1\n")
    calls.fail = "--version" if wrong == "pip" else None
    setup.make_venv()
    assert calls[-1] == f"{BASE} -m venv --clear ROOT/.venv"
    assert ("--version" in calls[0]) == (wrong == "pip")
    version = "{}.{}".format(*sys.version_info)
    assert (
        f".venv is broken or not of Python {version}: building it anew" in capsys.readouterr().out
    )


def test_another_opencv_is_replaced(setup, calls):
    (setup.VENV.joinpath(*LAYOUT) / "cv2").mkdir(parents=True)
    (setup.VENV.joinpath(*LAYOUT) / "cv2/version.py").write_text("headless = False\n")
    setup.install_headless_opencv()
    assert calls == [f"{UV_INSTALL} --quiet --no-deps --reinstall opencv-python-headless==4.13.0"]


def test_a_failing_step_is_named(setup, calls, capsys):
    calls.fail = "pip check"
    with pytest.raises(setup.SetupError) as error:
        setup.set_up(None, "lite")
    assert str(error.value) == "pip check failed (3), see above; `make setup` goes on from here"
    assert not setup.STAMP.exists()
    calls.fail = "--retries"
    with pytest.raises(setup.SetupError, match="pip could not install its own tools, see above"):
        setup.install_build_tools()


def test_a_wheel_that_was_repacked_is_taken_again(setup, calls):
    setup.BUILT.mkdir()
    (setup.BUILT / "sal_detectron2-0.6.1-py3-none-any.whl").touch()
    setup.install_detectron2()
    assert calls == [
        f"{UV_INSTALL} --quiet --no-deps --no-index ROOT/.whl/sal_detectron2-0.6.1-py3-none-any.whl"
    ]


@pytest.mark.parametrize("cuda", ["0", "1"])
@pytest.mark.parametrize("there", [False, True])
def test_mmcv_is_compiled(setup, calls, cuda, there, monkeypatch, capsys):
    """After a kill in the source that is there."""
    monkeypatch.setenv("FORCE_CUDA", cuda)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.setenv("MAX_JOBS", "3")
    kind, builds = {"0": "cpu", "1": "cuda"}[cuda], []
    tag = "{}.{}".format(*sys.version_info)
    work = setup.BUILT / f"mmcv-{tag}-torch-2.11.0-{kind}"
    wheel = "mmcv-2.1.0-cp{0}{1}-cp{0}{1}-linux_x86_64.whl".format(*sys.version_info)
    if there:
        (work / "mmcv-2.1.0").mkdir(parents=True)

    def build(what, command, log, env):
        assert (work / "mmcv-2.1.0").is_dir() and (there or (work / "mmcv-2.1.0/setup.py").exists())
        builds.append((what, [str(word) for word in command], log))
        names = ("MMCV_WITH_OPS", "FORCE_CUDA", "MAX_JOBS", "CUDA_VISIBLE_DEVICES")
        seen = "" if cuda == "0" else "5"
        assert [env[name] for name in names] == ["1", cuda, "3", seen]
        (work / "wheel").mkdir()
        (work / "wheel" / wheel).write_text("compiled")

    monkeypatch.setattr(setup, "run_ninja", build)
    out = setup.BUILT / f"torch-2.11.0-{kind}"
    for _ in range(2):  # the second time it is there
        assert setup.with_compiled_wheel("2.1.0", None) == out
    assert (out / wheel).read_text() == "compiled" and not work.exists()
    words = [str(setup.VENV_PYTHON), *"-m pip wheel --verbose --no-deps".split()]
    words += ["--no-build-isolation", "--no-cache-dir", "--wheel-dir", str(work / "wheel")]
    what = "compiling mmcv"
    assert builds == [(what, [*words, str(work / "mmcv-2.1.0")], work / "build.log")]
    assert "compiling mmcv 2.1.0, 3 files at once: with 2 cores" in capsys.readouterr().out
    flags = "--quiet --no-deps --no-build-isolation --no-binary=mmcv"
    folder = f"ROOT/.whl/mmcv-{tag}-torch-2.11.0-{kind}"
    fetched = [f"{PIP} download {flags} --dest {folder} mmcv==2.1.0"]
    assert calls == ([] if there else fetched)
    for command, options in zip(calls, calls.options, strict=True):
        assert options["env"]["MMCV_WITH_OPS"] == "1", command


@pytest.mark.parametrize(
    ("gigabytes", "cores", "jobs"),
    [(1.0, 8, 1), (2.59, 8, 1), (2.61, 8, 2), (16, 3, 3), (16, 64, 12)],
)
def test_compilers_need_memory_and_cores(setup, gigabytes, cores, jobs, monkeypatch):
    sizes = {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": gigabytes * 1e6}
    monkeypatch.setattr("os.sysconf", sizes.get)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert setup.compilers_at_once() == jobs


def test_the_size_of_a_folder_is_of_all_files_in_it(setup, tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/one").write_bytes(b"123")
    (tmp_path / "a/b/two").write_bytes(b"12345")
    (tmp_path / "a/b/link").symlink_to("absent")
    assert setup.size_of(tmp_path / "a") == 3 + 5 + len("absent")


def test_a_program_that_is_not_there_does_not_succeed(setup, monkeypatch):
    monkeypatch.undo()
    assert setup.succeeds(sys.executable, "-c", "pass")
    assert not setup.succeeds(sys.executable, "-c", "raise SystemExit(1)")
    assert not setup.succeeds("/no/such/program")


def test_imports_are_reported(setup, monkeypatch, capsys):
    monkeypatch.setattr(setup, "REPORTED", ("pytest", "xml.dom", "packaging"))
    assert setup.report_versions() == 0
    packaging = setup.metadata.version("packaging")
    rows = [("pytest", pytest.__version__), ("xml.dom", "ok"), ("packaging", packaging)]
    lines = [f"  {name:<12} {version}" for name, version in rows]
    assert capsys.readouterr().out.splitlines() == lines
    monkeypatch.setattr(setup, "REPORTED", ("no_such_package", "pytest"))
    assert setup.report_versions() == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first == (
        "  no_such_package does not import: ModuleNotFoundError: No module named 'no_such_package'"
    )
    assert second == lines[0]


@pytest.mark.parametrize(
    ("ends", "status", "said"),
    [
        (None, 0, ""),
        ("SetupError", 1, "setup: the reason\n"),
        ("KeyboardInterrupt", 130, "\nsetup: interrupted; `make setup` goes on from here\n"),
    ],
)
def test_how_it_ends(setup, ends, status, said, monkeypatch, capsys):
    given = []

    def set_up(*arguments):
        given.append(arguments)
        if ends:
            raise getattr(setup, ends, KeyboardInterrupt)("the reason")

    monkeypatch.setattr(setup, "set_up", set_up)
    monkeypatch.setattr(setup.sys, "argv", ["setup_environment.py"])
    monkeypatch.setenv("WHEELHOUSE", "/wheels")
    monkeypatch.setenv("MMCV", "")
    assert setup.main() == status
    assert capsys.readouterr().err == said
    monkeypatch.setenv("MMCV", "lite")
    monkeypatch.delenv("WHEELHOUSE")
    setup.main()
    assert given == [("/wheels", None), (None, "lite")]


def test_versions_are_a_command_of_their_own(setup, monkeypatch):
    monkeypatch.setattr(setup, "set_up", None)
    monkeypatch.setattr(setup, "report_versions", lambda: 7)
    monkeypatch.setattr(setup.sys, "argv", ["setup_environment.py", "versions"])
    assert setup.main() == 7


def test_every_problem_is_a_line(setup, calls, monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(setup, "problems", lambda *words: given.append(words) or iter(["a", "b"]))
    with pytest.raises(setup.SetupError, match="^a\nsetup: b$"):
        setup.set_up(str(tmp_path / "x/../wheels"), "compiled")
    assert given == [(tmp_path / "wheels", "compiled")] and calls == []


def test_another_system_is_named(monkeypatch):
    module = load_tool("setup_environment")
    monkeypatch.setattr(module, "sys", SimpleNamespace(**vars(sys) | {"platform": "darwin"}))
    (line,) = module.problems()
    assert line.startswith("the pinned versions are for Linux, this is darwin; make an environment")


@pytest.mark.parametrize(
    ("free", "held", "said"), [(12e9, 0, ""), (11e9, 1e9, ""), (11e9, 0.9e9, "free 0.1 GB more")]
)
def test_what_the_venv_holds_counts_as_free(free, held, said, monkeypatch):
    module = load_tool("setup_environment")
    monkeypatch.setattr(module, "size_of", lambda folder: held)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.setattr(module.shutil, "which", lambda name: name)
    lines = list(module.problems())
    assert [line.partition("; ")[2] for line in lines] == ([said] if said else [])
