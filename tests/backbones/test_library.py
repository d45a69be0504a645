"""The cache of compiled C kernels: what is loaded, what is refused, who compiles."""

import ctypes
import fcntl
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

from backbones.ops import library, native
from tests.support import run_bare, run_code

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler"
)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache folder of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    library._cache.cache_clear()
    yield tmp_path / "cache"
    library._cache.cache_clear()


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """The command of a compiler that builds one small function, and the file of its calls."""
    source, calls = tmp_path / "small.c", tmp_path / "calls"
    source.write_text("int answer(void) { return 42; }")
    script = tmp_path / "quick cc"
    script.write_text(
        f"""#!/bin/sh
[ "$2" = --version ] && exec echo 1
echo "$1" >> '{calls}'
while [ "$1" != -o ]; do shift; done
sleep 0.3
exec cc -shared -fPIC '{source}' -o "$2"
"""
    )
    script.chmod(0o755)
    return [str(script), "first"], calls


def loaded(command) -> Path:
    """The file that ``load`` takes."""
    library.load(command, "float")
    (path,) = library._cache(library._key(command)).glob("float-*.so")
    return path


def compiled(calls: Path) -> int:
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def plant(path: Path, marker: Path, tmp_path: Path) -> Path:
    """A library that leaves ``marker`` when it is loaded, under a name that fits its content."""
    (tmp_path / "planted.c").write_text(
        "#include <stdio.h>\n__attribute__((constructor)) static void run(void) "
        f'{{ fclose(fopen("{marker}", "w")); }}\n'
    )
    built = tmp_path / "planted.so"
    subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "planted.c", "-o", built], check=True)
    return Path(shutil.copy(built, path / f"float-{library._digest(built)}.so"))


def test_a_second_process_compiles_nothing(cache, quick):
    command, calls = quick
    path = loaded(command)
    assert path.is_relative_to(cache) and path.parent.stat().st_mode & 0o777 == 0o700
    assert library.load(command, "float").answer() == 42
    assert compiled(calls) == 1
    assert not [entry for entry in path.parent.iterdir() if entry.name not in ("lock", path.name)]


@pytest.mark.parametrize("size", [0, 100, 4097])
def test_a_damaged_library_is_built_again(cache, quick, size):
    command, calls = quick
    path = loaded(command)
    # A new file: the one that is loaded stays mapped.
    content = path.read_bytes()[:size]
    path.unlink()
    path.write_bytes(content)
    assert library.load(command, "float").answer() == 42
    assert compiled(calls) == 2


def test_a_library_of_this_user_is_loaded(cache, quick, tmp_path):
    """What the tests of refusal rest on: the planted one does run where nothing is wrong."""
    folder = library._cache(library._key(quick[0]))
    plant(folder, tmp_path / "ran", tmp_path)
    library.load(quick[0], "float")
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("open_to_all", ["cache", "cache/dense-backbones", "key", "file"])
def test_a_planted_library_is_not_loaded(cache, quick, tmp_path, open_to_all):
    command, calls = quick
    folder = library._cache(library._key(command))
    planted = plant(folder, tmp_path / "ran", tmp_path)
    places = {"key": folder, "file": planted}
    places.get(open_to_all, tmp_path / open_to_all).chmod(0o777)
    library._cache.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert library.load(command, "float").answer() == 42
    assert not (tmp_path / "ran").exists()
    assert compiled(calls) == 1
    if open_to_all != "file":
        (message,) = [str(warning.message) for warning in said]
        assert "can be written by others; the C kernels are compiled for this process" in message


def test_a_library_of_another_user_is_not_loaded(cache, quick, tmp_path, monkeypatch):
    folder = library._cache(library._key(quick[0]))
    plant(folder, tmp_path / "ran", tmp_path)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert library._untrusted(folder) == f"{folder} belongs to user {user}"
    assert library._intact(folder, "float") is None


def test_a_link_to_a_library_is_not_loaded(cache, quick, tmp_path):
    folder = library._cache(library._key(quick[0]))
    planted = plant(folder, tmp_path / "ran", tmp_path)
    planted.rename(tmp_path / "elsewhere.so")
    planted.symlink_to(tmp_path / "elsewhere.so")
    assert library.load(quick[0], "float").answer() == 42
    assert not (tmp_path / "ran").exists()


def test_a_group_counts_as_others_unless_it_is_the_users_own(cache, quick, monkeypatch):
    folder = library._cache(library._key(quick[0]))
    folder.chmod(0o770)
    monkeypatch.setattr(library, "_is_of_this_user_alone", lambda group: False)
    assert "can be written by others" in library._untrusted(folder)
    monkeypatch.setattr(library, "_is_of_this_user_alone", lambda group: True)
    assert library._untrusted(folder) is None


def test_without_a_home_the_process_has_a_folder_of_its_own(cache, quick, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert library.load(quick[0], "float").answer() == 42
    folder = library._cache(library._key(quick[0]))
    assert folder.parent == Path(library._scratch().name) and not folder.is_relative_to(cache)


def test_a_cache_that_cannot_be_made_is_no_error(cache, quick):
    cache.write_text("a file")
    assert library.load(quick[0], "float").answer() == 42


def test_one_compiles_while_the_others_wait(cache, quick):
    command, calls = quick
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(library.load(command, "float").answer()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [42] * 4 and compiled(calls) == 1


def test_waiting_has_an_end(cache, quick, monkeypatch):
    monkeypatch.setattr(library, "SECONDS", 0.2)
    folder = library._cache(library._key(quick[0]))
    with open(folder / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="lock was held for 0.2 s"):
            library.load(quick[0], "float")


def test_the_compilers_command_may_have_arguments(monkeypatch):
    monkeypatch.setenv("CC", "env 'A=b c' cc")
    assert library.compiler() == ["env", "A=b c", "cc"]
    library._key(library.compiler())
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    with pytest.raises(library.MissingCompiler, match="no C compiler was found"):
        library.compiler()
    monkeypatch.setenv("CC", "cc 'half")
    with pytest.raises(library.MissingCompiler, match="CC=cc 'half: No closing quotation"):
        library.compiler()


def test_the_c_library_is_in_the_key(monkeypatch):
    key = library._key(["cc"])
    monkeypatch.setattr(library.platform, "libc_ver", lambda: ("glibc", "2.99"))
    assert library._key(["cc"]) != key


@pytest.mark.slow
def test_the_kernels_themselves_load(cache):
    for kind in library.TYPES:
        assert isinstance(library.load(["cc"], kind), ctypes.CDLL)


AVX512 = "avx512f avx512bw avx512dq avx512vl"


@pytest.mark.parametrize(
    "flags, chosen",
    [
        (f"sse2 {AVX512} avx512_bf16 avx2 fma f16c", "avx512bf16"),
        (f"sse2 {AVX512} avx2 fma f16c", "avx512"),
        (f"sse2 {AVX512.replace(' avx512vl', '')} avx512_bf16 avx2 fma f16c", "avx2"),
        ("fma f16c avx2", "avx2"),
        ("fma avx2", None),
        ("avx fma f16c", None),
        ("avx2 avx512f", None),
        ("fp asimd", None),
    ],
)
def test_the_processor_chooses_the_packaged_library(monkeypatch, tmp_path, flags, chosen):
    monkeypatch.setattr(library, "_processor", lambda: f"flags : {flags}")
    assert library.packaged("double") is None  # a checkout has none
    monkeypatch.setattr(library, "_PACKAGED", tmp_path)
    assert library.packaged("double") == (chosen and tmp_path / f"double-{chosen}.so")


def test_the_packaged_library_comes_first_and_the_compiler_is_behind_it(
    cache, quick, monkeypatch, tmp_path, recwarn
):
    command, calls = quick
    monkeypatch.setenv("CC", shlex.join(command))
    monkeypatch.setattr(library, "_PACKAGED", tmp_path)
    monkeypatch.setattr(library, "_processor", lambda: "flags : avx2 fma f16c")
    double = tmp_path / "double-avx2.so"
    built = ["cc", "-shared", "-fPIC", tmp_path / "small.c", "-o"]
    subprocess.run([*built, tmp_path / "float-avx2.so"], check=True)
    double.write_text("of another platform")
    native._build.cache_clear()
    try:
        assert native.origin().startswith(f"compiled on this machine: {cache}")
        assert compiled(calls) == 2
        (said,) = [str(warning.message) for warning in recwarn]
        assert "double-avx2.so" in said and "the packaged C kernels are left" in said

        native._build.cache_clear()
        monkeypatch.setenv("CC", "no-such-compiler")
        assert native.origin() is None and "no C compiler was found" in native.missing()

        native._build.cache_clear()
        double.unlink()
        subprocess.run([*built, double], check=True)
        assert native.origin() == "from the package: float-avx2.so"
    finally:
        native._build.cache_clear()


@pytest.mark.slow
def test_one_openmp_is_loaded():
    """PyTorch's; a second one would start as many threads again."""
    code = (
        "import torch; from backbones import ops\n"
        "x, taps = torch.ones(1, 9, 9, 8), torch.ones(8, 1, 3, 3)\n"
        "with ops.force('native'): ops.depthwise_conv(x, taps)\n"
        "for line in open('/proc/self/maps'): print(line.split()[-1])"
    )
    ran = run_bare(partial(run_code, code))
    assert ran.returncode == 0, ran.stderr
    mapped = {Path(p) for p in ran.stdout.split() if re.search(r"/lib[a-z]*omp[^/]*$", p)}
    assert mapped == set(Path(torch.__file__).resolve().parent.glob("lib/libgomp*"))


def test_how_a_wheel_s_kernels_are_compiled(monkeypatch, tmp_path):
    """Each type of maps for each set of instructions; the second command links no OpenMP."""
    ran, loaded = [], []

    def run(words, cwd=None, check=False):
        assert check
        ran.append(([str(word) for word in words], cwd))
        if "-c" in words:
            for name in ("two.o", "one.o"):
                Path(cwd, name).touch()

    monkeypatch.setattr(library.subprocess, "run", run)
    monkeypatch.setattr(library, "compiler", lambda: ["cc", "-x"])
    monkeypatch.setattr(library.ctypes, "CDLL", lambda *given, **more: loaded.append((given, more)))
    library.package(tmp_path / "deep" / "kernels")
    avx2, avx512 = ["-mavx2", "-mfma", "-mf16c"], [f"-m{name}" for name in AVX512.split()]
    sets = {"avx512bf16": ["-mavx512bf16", *avx512, *avx2], "avx512": [*avx512, *avx2]}
    sets["avx2"] = avx2
    types = {"float": ["-DREAL=float"], "double": ["-DREAL=double"]}
    types |= {"bfloat16": ["-DREAL=float", "-DBFLOAT16"], "float16": ["-DREAL=float", "-DFLOAT16"]}
    sources = [str(path) for path in sorted(Path(library.__file__).parent.glob("*.c"))]
    expected = []
    for kind, name in itertools.product(types, sets):
        built = str(tmp_path / "deep" / "kernels" / f"{kind}-{name}.so")
        flags = [*sets[name], "-mprefer-vector-width=256", *types[kind]]
        expected.append(["cc", "-x", "-O3", "-fopenmp", "-fPIC", *flags, "-c", *sources])
        expected.append(["cc", "-x", "-shared", "-s", "one.o", "two.o", "-o", built, "-lm"])
    assert [
        [Path(word).name if word.endswith(".o") else word for word in words] for words, _ in ran
    ] == expected
    assert all(Path(cwd).is_absolute() and cwd != tmp_path for _, cwd in ran[::2])
    assert loaded[0] == (("libgomp.so.1",), {"mode": ctypes.RTLD_GLOBAL})
    assert [given[0] for given, _ in loaded[1:]] == [words[-2] for words in expected[1::2]]


@pytest.mark.parametrize("error", [FileExistsError, PermissionError])
def test_file_systems_without_links_or_locks(error, cache, quick, monkeypatch):
    """Another process may have been first, or names are all that there is."""

    def link(built, final):
        if error is FileExistsError:
            shutil.copy(built, final)
        raise error

    def lock(*given):
        raise OSError("no locks")

    monkeypatch.setattr(library.os, "link", link)
    monkeypatch.setattr(library.fcntl, "flock", lock)
    path = loaded(quick[0])
    assert path.stem == f"float-{library._digest(path)}" and compiled(quick[1]) == 1
    assert path.stat().st_mode & 0o777 == 0o700


def test_the_command_that_compiles(cache, monkeypatch, tmp_path):
    given = []

    def run(words, **more):
        given.append(([str(word) for word in words], more))
        Path(words[words.index("-o") + 1]).write_text("built")

    monkeypatch.setattr(library.subprocess, "run", run)
    path = library._compile(["cc", "-x"], "bfloat16", tmp_path)
    [(words, more)] = given
    sources = [str(path) for path in sorted(Path(library.__file__).parent.glob("*.c"))]
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-DREAL=float", "-DBFLOAT16"]
    assert words[: -len(sources) - 3] == ["cc", "-x", *flags]
    assert words[-len(sources) - 3 : -3] == sources and words[-3::2] == ["-o", "-lm"]
    assert more == dict(capture_output=True, text=True, check=True, timeout=300)
    assert path.parent == tmp_path and [
        entry.name for entry in tmp_path.iterdir() if entry.is_file()
    ] == [path.name]


def test_what_the_key_of_a_cache_holds(monkeypatch, tmp_path):
    """Sources and headers, the command and its version, flags and the processor."""
    keys = [library._key(["cc"])]
    assert library._key(["cc"]) == keys[0] and len(keys[0]) == 16
    keys.append(library._key(["cc", "-w"]))
    other = tmp_path / "other.c"
    other.write_text("int other;")
    for name, value in (
        ("_SOURCES", (other,)),
        ("_HEADERS", (other,)),
        ("_FLAGS", ("-O2",)),
        ("TYPES", {}),
        ("_processor", lambda: "another"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(library, name, value)
            keys.append(library._key(["cc"]))
    run = subprocess.run
    monkeypatch.setattr(
        library.subprocess, "run", lambda *given, **more: run(["echo", "2"], **more)
    )
    keys.append(library._key(["cc"]))
    assert len(set(keys)) == len(keys)
