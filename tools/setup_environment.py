"""Build .venv from PyPI with the versions pinned in requirements/; `make setup` runs this.

Running it again continues where it stopped, and does nothing if nothing has changed. It uses the
standard library only, and syntax of Python 3.6, so that an old Python gets as far as the error that
names the supported versions.

Environment variables:
  MMCV=lite      mmcv-lite with torchvision's operators; the default of a new .venv
  MMCV=compiled  mmcv, compiled or from a wheel in WHEELHOUSE; without MMCV the installed one stays
  WHEELHOUSE     a folder of prebuilt wheels
  FORCE_CUDA=1   compile mmcv for CUDA too
  MAX_JOBS       number of parallel compilers
"""

import ast
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
UV = VENV / "bin" / "uv"
STAMP = VENV / ".setup-done"
BUILT = ROOT / ".whl"  # wheels built here, kept when .venv is rebuilt
LOCK = ROOT / "requirements" / "lock.txt"
DETECTRON2 = ROOT / "requirements" / "detectron2.txt"
STAND_IN = ROOT / "dense" / "openmmlab" / "mmcv_ext.py"
INPUTS = (LOCK, DETECTRON2, STAND_IN, ROOT / "pyproject.toml", Path(__file__).resolve())

START = time.monotonic()
SUPPORTED = ((3, 11), (3, 12))
THIS = "{}.{}".format(*sys.version_info)
DISK = 12e9  # bytes
MEMORY_PER_COMPILER = 1.3e9  # bytes
# uv downloads in parallel; the others build packages that PyPI has as source only.
BUILD_TOOLS = ("pip", "setuptools", "wheel", "uv")
VARIANTS = {"lite": "mmcv-lite", "compiled": "mmcv"}  # the package of each MMCV
MMCV_IS = {
    "lite": "mmcv-lite with torchvision's operators in it (MMCV=compiled compiles mmcv's own)",
    "compiled": "mmcv with its own operators (MMCV=lite takes torchvision's)",
}
REPORTED = (
    *("torch", "torchvision", "timm", "mmengine", "mmcv", "mmcv.ops", "mmseg", "mmdet"),
    *("detectron2", "pycocotools", "backbones", "dense"),
)


class SetupError(Exception):
    """A step failed; the message says why and what to do, in one line."""


def main():
    if sys.argv[1:] == ["versions"]:
        return report_versions()
    try:
        set_up(os.environ.get("WHEELHOUSE"), os.environ.get("MMCV") or None)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; `make setup` goes on from here", file=sys.stderr)
        return 130
    return 0


def set_up(wheelhouse, variant):
    if is_done(variant):
        return
    wheelhouse = Path(wheelhouse).resolve() if wheelhouse else None
    found = list(problems(wheelhouse, variant))
    if found:
        raise SetupError("\nsetup: ".join(found))
    checkout = os.open(str(ROOT), os.O_RDONLY)
    fcntl.flock(checkout, fcntl.LOCK_EX)  # one set-up at a time
    if is_done(variant):
        return

    make_venv()
    temporary = VENV / "tmp"
    temporary.mkdir(exist_ok=True)
    # The system's folder may be on a smaller disk than the one that was checked for space.
    os.environ.setdefault("TMPDIR", str(temporary))
    forget_half_installed()
    variant = variant or installed_variant() or "lite"
    install_build_tools()
    install_locked(wheelhouse)
    install_headless_opencv()
    install_mmcv(variant, wheelhouse)
    install_detectron2()
    say("dense-backbones itself")
    quiet = dict(os.environ, PYTHONWARNINGS="ignore")  # setuptools, on editable installations
    uv("install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", ROOT, env=quiet)
    if variant == "lite":
        # Programs that import MMDetection before this package need it on disk.
        run("the stand-in for mmcv._ext", VENV_PYTHON, "-m", "dense.openmmlab.mmcv_lite")
    shutil.rmtree(str(temporary))

    say("importing all packages for the first time")
    run("pip check", VENV_PYTHON, "-m", "pip", "check")
    run("importing what was installed", VENV_PYTHON, Path(__file__).resolve(), "versions")
    STAMP.write_text(fingerprint(variant))
    say(f"done, {VENV} is ready, {MMCV_IS[variant]}")


def is_done(variant=None):
    """Whether .venv is complete and current, with either mmcv if none is named."""
    if not (VENV_PYTHON.exists() and STAMP.exists()):
        return False
    return STAMP.read_text() in map(fingerprint, [variant] if variant else VARIANTS)


def fingerprint(variant):
    digest = hashlib.sha256((THIS + variant).encode())
    for path in INPUTS:
        digest.update(path.read_bytes())
    return digest.hexdigest()


# Before anything is downloaded


def problems(wheelhouse=None, variant=None):
    """Yield one line for everything that would make the set-up fail later."""
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
    if wheelhouse and not wheelhouse.is_dir():
        yield f"WHEELHOUSE={wheelhouse} is not a folder; name one that holds wheels, or unset it"
    if variant not in (None, *VARIANTS):
        yield f"MMCV={variant}: {' and '.join(VARIANTS)} are valid"
    if variant == "compiled" and "mmcv" not in installed() and not mmcv_wheels(wheelhouse):
        yield from problems_of_compiling()
    free = shutil.disk_usage(str(ROOT)).free
    missing = DISK - free
    if missing > 0 and missing > size_of(VENV):
        yield (
            f"{free / 1e9:.1f} GB are free where {ROOT} lies, set-up needs {DISK / 1e9:.0f} GB; "
            f"free {(missing - size_of(VENV)) / 1e9:.1f} GB more"
        )


def problems_of_compiling():
    other = "name a folder that holds a wheel of mmcv (WHEELHOUSE=...), or take MMCV=lite"
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        yield (
            f"MMCV=compiled and no C++ compiler ({compiler}); install one (Debian, Ubuntu: apt "
            f"install g++), {other}"
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        yield (
            f"MMCV=compiled and {header} is missing; install Python's headers (Debian, Ubuntu: apt "
            f"install python{THIS}-dev), {other}"
        )


def size_of(folder):
    files = (Path(top) / name for top, _, names in os.walk(str(folder)) for name in names)
    return sum(path.lstat().st_size for path in files)


def locked():
    """Package name to version in the lock file."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", LOCK.read_text(), re.MULTILINE))


def installed():
    """Package name to version in .venv."""
    found = metadata.distributions(path=[str(VENV / f"lib/python{THIS}/site-packages")])
    return {
        re.sub("[-_.]+", "-", each.metadata["Name"]).lower(): each.version
        for each in found
        if is_whole(each._path)
    }


def is_whole(dist_info):
    """Whether an installation was completed: pip and uv write INSTALLER after the files."""
    return (dist_info / "INSTALLER").exists()


def installed_variant():
    """Which mmcv is in .venv, or None."""
    have = installed()
    return next((variant for variant, name in VARIANTS.items() if name in have), None)


def mmcv_wheels(folder):
    """The wheels in a folder of the required mmcv for this Python."""
    name = f"mmcv-{locked()['mmcv-lite']}-cp{THIS.replace('.', '')}-*.whl"
    return list(folder.glob(name)) if folder else []


# The steps; each checks itself what is left to do


def make_venv():
    config = VENV / "pyvenv.cfg"
    version = rf"^version\s*=\s*{re.escape(THIS)}\."
    if config.exists() and re.search(version, config.read_text(), re.MULTILINE):
        if succeeds(VENV_PYTHON, "-m", "pip", "--version"):
            return
    if VENV.exists():
        say(f".venv is broken or not of Python {THIS}: building it anew")
    # If this is .venv's own Python, the Python that it was made with.
    python = getattr(sys, "_base_executable", sys.executable)
    run("creating .venv", python, "-m", "venv", "--clear", VENV)


def forget_half_installed():
    """Remove the metadata of incomplete installations, so that they are installed again."""
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
    """Install the lock file without mmcv and the headless OpenCV, which have steps of their own."""
    have = installed()
    later = {"mmcv-lite", "opencv-python-headless"}
    left = [(name, pin) for name, pin in locked().items() if name not in later]
    left = [f"{name}=={pin}" for name, pin in left if have.get(name) != pin]
    if left:
        say(f"{len(left)} packages, 3 GB to download")
        uv("install", "--no-deps", "--no-build-isolation", *links(wheelhouse), *left)


def install_headless_opencv():
    """Install OpenCV without GUI over opencv-python, which mmcv requires and which needs libGL."""
    version = VENV / f"lib/python{THIS}/site-packages/cv2/version.py"
    if not version.exists() or "headless = True" not in version.read_text():
        say("the headless cv2")
        package = f"opencv-python-headless=={locked()['opencv-python-headless']}"
        uv("install", "--quiet", "--no-deps", "--reinstall", package)


def install_mmcv(variant, wheelhouse):
    """Install mmcv or mmcv-lite; both write the same folder, so the other is removed first."""
    have, version = installed(), locked()["mmcv-lite"]
    name = VARIANTS[variant]
    if have.get(name) == version:
        return
    if variant == "compiled":
        wheelhouse = with_compiled_wheel(version, wheelhouse)
    say(f"{name} {version}")
    there = [other for other in VARIANTS.values() if other in have]
    if there:
        uv("uninstall", "--quiet", *there)
    only = ["--no-index", "--only-binary=mmcv"] if variant == "compiled" else []
    uv("install", "--quiet", "--no-deps", *only, *links(wheelhouse), f"{name}=={version}")


def with_compiled_wheel(version, wheelhouse):
    """The folder with a wheel of mmcv: WHEELHOUSE, or one below .whl after compiling into it."""
    if mmcv_wheels(wheelhouse):
        return wheelhouse
    cuda = os.environ.get("FORCE_CUDA") == "1"
    built = BUILT / "torch-{}-{}".format(locked()["torch"], "cuda" if cuda else "cpu")
    if not mmcv_wheels(built):
        compile_mmcv(version, built, cuda)
    return built


def compile_mmcv(version, out, cuda):
    """Compile in a folder that is kept until the wheel is complete: ninja resumes after a kill."""
    jobs = int(os.environ.get("MAX_JOBS") or compilers_at_once())
    say(
        f"compiling mmcv {version}, {jobs} files at once: with 2 cores it takes 12 to 14 minutes, "
        "longer for CUDA. WHEELHOUSE=folder takes a prebuilt wheel instead."
    )
    work = BUILT / f"mmcv-{THIS}-{out.name}"
    source = work / f"mmcv-{version}"
    env = dict(os.environ, MMCV_WITH_OPS="1", FORCE_CUDA=str(int(cuda)), MAX_JOBS=str(jobs))
    if not cuda:
        env["CUDA_VISIBLE_DEVICES"] = ""  # with a visible GPU mmcv requires the CUDA toolkit
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
    """Keep an installed Detectron2, or install sal-detectron2 without its compiled operators.

    Those are compiled for one old Python, torch and CUDA, and nothing here uses them.
    """
    if {"detectron2", "sal-detectron2"} & set(installed()):
        return
    say("detectron2")
    version = re.search(r"==(\S+)", DETECTRON2.read_text()).group(1)
    wheel = BUILT / f"sal_detectron2-{version}-py3-none-any.whl"
    if not wheel.exists():
        repack_detectron2(wheel)
    uv("install", "--quiet", "--no-deps", "--no-index", wheel)


def repack_detectron2(wheel):
    work = BUILT / "detectron2"
    shutil.rmtree(str(work), ignore_errors=True)
    work.mkdir(parents=True)
    # The wheel is tagged for Python 3.10 only.
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
    """Import all packages and print their versions; returns 1 if an import fails."""
    owners = metadata.packages_distributions()
    failed = 0
    for name in REPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:  # an extension built for another torch may raise anything
            print(f"  {name:<12} does not import: {type(error).__name__}: {error}")
            failed = 1
            continue
        version = "ok" if "." in name else metadata.version(owners[name][0])
        print(f"  {name:<12} {version}", flush=True)
    return failed


# Programs and files


def say(what):
    print(f"setup: [{time.monotonic() - START:3.0f} s] {what}", flush=True)


def links(folder):
    return ["--find-links", folder] if folder else []


def pip(*arguments, env=None):
    run(f"pip {arguments[0]}", VENV_PYTHON, "-m", "pip", *arguments, env=env)


def uv(verb, *arguments, env=None):
    env = dict(env or os.environ)
    for name, value in pips_index().items():
        env.setdefault(name, value)
    run(f"uv pip {verb}", UV, "pip", verb, "--python", VENV_PYTHON, *arguments, env=env)


def pips_index():
    """pip's configured package indexes, as uv's environment variables."""
    listed = [str(VENV_PYTHON), "-m", "pip", "config", "list"]
    out = subprocess.run(listed, stdout=subprocess.PIPE, text=True, check=False)
    found = re.findall(r"^(global|install|:env:)\.([\w-]+)=(.*)$", out.stdout, re.MULTILINE)
    found.sort(key=lambda entry: entry[0] == ":env:")  # the environment overrides pip's files
    pips = {name: ast.literal_eval(value) for _, name, value in found}
    uvs = {
        "UV_DEFAULT_INDEX": pips.get("index-url"),
        "UV_INDEX": pips.get("extra-index-url"),
        "UV_FIND_LINKS": ",".join(pips.get("find-links", "").split()),
        "SSL_CERT_FILE": pips.get("cert"),
        # pip takes a version from any index.
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    return {name: " ".join(value.split()) for name, value in uvs.items() if value}


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
    """Run a build, write its output to a log, and print ninja's progress (``[3/85]``)."""
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
    """Move a file into a folder atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    os.replace(str(path), str(folder / path.name))


if __name__ == "__main__":
    sys.exit(main())
