"""Builds .venv, from PyPI alone, with the versions of requirements/: what `make setup` runs.

Run again it goes on where it stopped, and does nothing when nothing changed. It needs the standard
library alone, and no syntax newer than Python 3.6: an older Python is told so in one line.

Environment: WHEELHOUSE, a folder of prebuilt wheels; FORCE_CUDA=1, to compile mmcv's operators for
CUDA too; MAX_JOBS, how many compilers run at once.
"""

import fcntl
import hashlib
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

try:
    from importlib import metadata
except ImportError:  # Python 3.7 and older, which problems() refuses
    metadata = None

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".setup-done"
BUILT = ROOT / ".whl"  # wheels made here: they outlive .venv
LOCK = ROOT / "requirements" / "lock.txt"
DETECTRON2 = ROOT / "requirements" / "detectron2.txt"
INPUTS = (LOCK, DETECTRON2, ROOT / "pyproject.toml", Path(__file__).resolve())

SUPPORTED = ((3, 11), (3, 12))
THIS = "{}.{}".format(*sys.version_info)
DISK = 12e9  # bytes
BATCH = 12  # packages in one call of pip: an interruption loses no more than these
MEMORY_PER_COMPILER = 1.3e9  # bytes
BUILD_TOOLS = ("pip", "setuptools", "wheel", "ninja", "psutil", "packaging")
REPORTED = (
    *("torch", "torchvision", "timm", "mmengine", "mmcv", "mmcv.ops", "mmseg", "mmdet"),
    *("detectron2", "pycocotools", "backbones", "dense"),
)


class SetupError(Exception):
    """What went wrong and what to do about it, in one line."""


def main():
    if sys.argv[1:] == ["versions"]:
        return report_versions()
    try:
        set_up(wheelhouse=os.environ.get("WHEELHOUSE"))
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; `make setup` goes on from here", file=sys.stderr)
        return 130
    return 0


def set_up(wheelhouse):
    if is_done():
        return
    wheelhouse = Path(wheelhouse).resolve() if wheelhouse else None
    found = list(problems(wheelhouse))
    if found:
        raise SetupError("\nsetup: ".join(found))
    checkout = os.open(str(ROOT), os.O_RDONLY)
    fcntl.flock(checkout, fcntl.LOCK_EX)  # one set-up at a time
    if is_done():
        return

    make_venv()
    temporary = VENV / "tmp"
    temporary.mkdir(exist_ok=True)
    # /tmp is often another and smaller disk than the one that was measured.
    os.environ.setdefault("TMPDIR", str(temporary))
    forget_half_installed()
    install_build_tools()
    install_locked(wheelhouse)
    install_headless_opencv()
    install_mmcv(wheelhouse)
    install_detectron2()
    say("dense-backbones itself")
    quiet = dict(os.environ, PYTHONWARNINGS="ignore")  # setuptools, on editable installations
    pip("install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", ROOT, env=quiet)
    shutil.rmtree(str(temporary))

    run("pip check", VENV_PYTHON, "-m", "pip", "check")
    run("importing what was installed", VENV_PYTHON, Path(__file__).resolve(), "versions")
    STAMP.write_text(fingerprint())
    say(f"done, {VENV} is ready")


def is_done():
    return VENV_PYTHON.exists() and STAMP.exists() and STAMP.read_text() == fingerprint()


def fingerprint():
    digest = hashlib.sha256(THIS.encode())
    for path in INPUTS:
        digest.update(path.read_bytes())
    return digest.hexdigest()


# Before anything is downloaded


def problems(wheelhouse=None):
    """Everything that would stop the set-up later on, a line each."""
    have = f"{sys.executable} is Python {THIS}"
    if sys.version_info[:2] not in SUPPORTED:
        yield (
            f"{have}; Python 3.11 or 3.12 is needed. Install one (Debian, Ubuntu: apt install "
            "python3 python3-venv) and, if it is not found, name it: make setup PYTHON=python3.11"
        )
        return
    if not sys.platform.startswith("linux"):
        yield (
            f"the pinned versions are for Linux, this is {sys.platform}; make an environment of "
            'your own: pip install ".[detection,segmentation,dev]"'
        )
        return
    lacking = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if lacking:
        yield (
            f"{have} without its module {' and '.join(lacking)}; install it "
            f"(Debian, Ubuntu: apt install python{THIS}-venv)"
        )
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        yield f"no C++ compiler ({compiler}); install one (Debian, Ubuntu: apt install g++)"
    if wheelhouse and not wheelhouse.is_dir():
        yield f"WHEELHOUSE={wheelhouse} is not a folder; name one that holds wheels, or unset it"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists() and not mmcv_wheels(wheelhouse) and "mmcv" not in installed():
        yield (
            f"mmcv must be compiled and {header} is missing; install Python's headers (Debian, "
            f"Ubuntu: apt install python{THIS}-dev) or name a folder with a wheel: WHEELHOUSE=..."
        )
    free = shutil.disk_usage(str(ROOT)).free
    missing = DISK - free
    if missing > 0 and missing > size_of(VENV):
        yield (
            f"{free / 1e9:.1f} GB are free where {ROOT} lies, set-up needs {DISK / 1e9:.0f} GB; "
            f"free {(missing - size_of(VENV)) / 1e9:.1f} GB more"
        )


def size_of(folder):
    files = (Path(top) / name for top, _, names in os.walk(str(folder)) for name in names)
    return sum(path.lstat().st_size for path in files)


def locked():
    """The version of every package in the lock."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", LOCK.read_text(), re.MULTILINE))


def installed():
    """The version of every package in .venv."""
    found = metadata.distributions(path=[str(VENV / f"lib/python{THIS}/site-packages")])
    return {
        re.sub("[-_.]+", "-", each.metadata["Name"]).lower(): each.version
        for each in found
        if is_whole(each._path)
    }


def is_whole(dist_info):
    """Whether pip got to the end of an installation: it writes INSTALLER after everything else."""
    return (dist_info / "INSTALLER").exists()


def mmcv_wheels(folder):
    """The wheels for this Python of the mmcv we want."""
    name = f"mmcv-{locked()['mmcv']}-cp{THIS.replace('.', '')}-*.whl"
    return list(folder.glob(name)) if folder else []


# The steps, each of which finds out by itself what is left to do


def make_venv():
    config = VENV / "pyvenv.cfg"
    version = rf"^version\s*=\s*{re.escape(THIS)}\."
    if config.exists() and re.search(version, config.read_text(), re.MULTILINE):
        if succeeds(VENV_PYTHON, "-m", "pip", "--version"):
            return
    if VENV.exists():
        say(f".venv is broken or not of Python {THIS}: building it anew")
    # The Python that made .venv, should this be the one inside.
    python = getattr(sys, "_base_executable", sys.executable)
    run("creating .venv", python, "-m", "venv", "--clear", VENV)


def forget_half_installed():
    """Lets pip install again what it was killed in the middle of."""
    for dist_info in VENV.glob("lib/python3.*/site-packages/*.dist-info"):
        if not is_whole(dist_info):
            shutil.rmtree(str(dist_info))


def install_build_tools():
    pins = locked()
    left = [name for name in BUILD_TOOLS if installed().get(name) != pins[name]]
    if not left:
        return
    say("build tools")
    try:
        pip("install", "--quiet", "--retries=2", *(f"{name}=={pins[name]}" for name in left))
    except SetupError as error:
        raise SetupError(
            "pip could not install its own tools, see above. Is PyPI, or the index that pip is "
            "configured for, within reach?"
        ) from error


def install_locked(wheelhouse):
    """Everything but mmcv, which needs the rest in order to be built."""
    have = installed()
    left = [f"{name}=={pin}" for name, pin in locked().items() if have.get(name) != pin]
    left = [pin for pin in left if not pin.startswith("mmcv==")]
    for start in range(0, len(left), BATCH):
        batch = left[start : start + BATCH]
        say(f"packages {start + 1} to {start + len(batch)} of {len(left)}")
        pip("install", "--no-deps", "--no-build-isolation", *links(wheelhouse), *batch)


def install_headless_opencv():
    """Lays the build without windows over the one that mmcv asks for, whose cv2 needs libGL."""
    version = VENV / f"lib/python{THIS}/site-packages/cv2/version.py"
    if not version.exists() or "headless = True" not in version.read_text():
        say("the headless cv2")
        package = f"opencv-python-headless=={locked()['opencv-python-headless']}"
        pip("install", "--quiet", "--no-deps", "--force-reinstall", package)


def install_mmcv(wheelhouse):
    version = locked()["mmcv"]
    if installed().get("mmcv") == version:
        return
    if not mmcv_wheels(wheelhouse):
        cuda = os.environ.get("FORCE_CUDA") == "1"
        wheelhouse = BUILT / "torch-{}-{}".format(locked()["torch"], "cuda" if cuda else "cpu")
        if not mmcv_wheels(wheelhouse):
            compile_mmcv(version, wheelhouse, cuda)
    say(f"mmcv {version}")
    local = ["--no-index", "--only-binary=mmcv", *links(wheelhouse)]
    pip("install", "--quiet", "--no-deps", *local, f"mmcv=={version}")


def compile_mmcv(version, out, cuda):
    """Compiles in a folder that stays until all is done, so that ninja goes on after a kill."""
    jobs = int(os.environ.get("MAX_JOBS") or compilers_at_once())
    say(
        f"compiling mmcv {version}, {jobs} files at once: with 2 cores it takes 12 to 14 minutes, "
        "longer for CUDA. WHEELHOUSE=folder takes a prebuilt wheel instead."
    )
    work = BUILT / f"mmcv-{THIS}-{out.name}"
    source = work / f"mmcv-{version}"
    env = dict(os.environ, MMCV_WITH_OPS="1", FORCE_CUDA=str(int(cuda)), MAX_JOBS=str(jobs))
    if not cuda:
        env["CUDA_VISIBLE_DEVICES"] = ""  # else mmcv wants the CUDA toolkit wherever a GPU is
    if not source.exists():
        shutil.rmtree(str(work), ignore_errors=True)
        flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-binary=mmcv"]
        pip("download", *flags, "--dest", work, f"mmcv=={version}", env=env)
        shutil.unpack_archive(str(next(work.glob("*.tar.gz"))), str(work / "unpacked"))
        (work / "unpacked" / source.name).rename(source)
    flags = ["--verbose", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    command = [VENV_PYTHON, "-m", "pip", "wheel", *flags, "--wheel-dir", work / "wheel", source]
    run_ninja("compiling mmcv", command, work / "build.log", env)
    move(next((work / "wheel").glob("*.whl")), out)
    shutil.rmtree(str(work))


def compilers_at_once():
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), int(memory / MEMORY_PER_COMPILER)))


def install_detectron2():
    """Keeps an installed Detectron2; else installs a release on PyPI without its compiled part.

    That part fits one old Python, torch and CUDA. What the models here need, torchvision has.
    """
    if {"detectron2", "sal-detectron2"} & set(installed()):
        return
    say("detectron2")
    version = re.search(r"==(\S+)", DETECTRON2.read_text()).group(1)
    wheel = BUILT / f"sal_detectron2-{version}-py3-none-any.whl"
    if not wheel.exists():
        repack_detectron2(wheel)
    pip("install", "--quiet", "--no-deps", "--no-index", wheel)


def repack_detectron2(wheel):
    work = BUILT / "detectron2"
    shutil.rmtree(str(work), ignore_errors=True)
    work.mkdir(parents=True)
    # Its file name says Python 3.10, so that is what pip is asked for.
    target = "--only-binary=:all: --python-version=3.10 --implementation=cp --abi=none".split()
    hashed = ["--require-hashes", "--requirement", DETECTRON2]
    pip("download", "--quiet", "--no-deps", *target, "--platform=any", *hashed, "--dest", work)
    tool = [VENV_PYTHON, "-m", "wheel"]
    original = next(work.glob("*.whl"))
    run("unpacking detectron2", *tool, "unpack", "--dest", work, original, quiet=True)
    tree = next(path for path in work.iterdir() if path.is_dir())
    for library in tree.glob("detectron2/_C*.so"):
        library.unlink()
    about = next(tree.glob("*.dist-info/WHEEL"))
    lines = [line for line in about.read_text().splitlines() if line and line[:4] != "Tag:"]
    about.write_text("\n".join([*lines, "Tag: py3-none-any", ""]))
    run("packing detectron2", *tool, "pack", "--dest-dir", work, tree, quiet=True)
    move(work / wheel.name, BUILT)
    shutil.rmtree(str(work))


def report_versions():
    """Imports everything that matters and prints its version; 1 if something does not import."""
    owners = metadata.packages_distributions()
    failed = 0
    for name in REPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:  # an extension that was built for another torch raises anything
            print(f"  {name:<12} does not import: {type(error).__name__}: {error}")
            failed = 1
            continue
        version = "ok" if "." in name else metadata.version(owners[name][0])
        print(f"  {name:<12} {version}", flush=True)
    return failed


# Programs and files


def say(what):
    print(f"setup: {what}", flush=True)


def links(folder):
    return ["--find-links", folder] if folder else []


def pip(*arguments, env=None):
    run(f"pip {arguments[0]}", VENV_PYTHON, "-m", "pip", *arguments, env=env)


def run(what, *command, env=None, quiet=False):
    out = subprocess.DEVNULL if quiet else None
    status = subprocess.call([str(part) for part in command], env=env, stdout=out)
    if status != 0:
        raise SetupError(f"{what} failed ({status}), see above; `make setup` goes on from here")


def succeeds(*command):
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return subprocess.call([str(part) for part in command], **silent) == 0
    except OSError:
        return False


def run_ninja(what, command, log, env):
    """Runs a build into a log and shows the progress that ninja puts there as [3/85]."""
    start, first = time.monotonic(), None
    process = subprocess.Popen(
        [str(part) for part in command],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
        errors="replace",
    )
    with process, log.open("w") as out:
        for line in process.stdout:
            out.write(line)
            found = re.match(r"\s*\[(\d+)/(\d+)\]", line)
            if not found:
                continue
            done, total = map(int, found.groups())
            first = done if first is None else first
            left = (time.monotonic() - start) / max(done - first, 1) * (total - done) / 60
            say(f"  {done} of {total} files, about {left:.0f} min left")
    if process.returncode != 0:
        print("".join(log.read_text(errors="replace").splitlines(True)[-30:]), file=sys.stderr)
        raise SetupError(f"{what} failed, see above and {log}; `make setup` goes on from here")


def move(path, folder):
    """Into place at once, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    os.replace(str(path), str(folder / path.name))


if __name__ == "__main__":
    sys.exit(main())
