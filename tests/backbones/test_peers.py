"""timm's own tests of its models, of the installed version, with our names: ``make test-peers``."""

import subprocess
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm

import backbones
from tests.support import run_python

pytestmark = pytest.mark.peers

KINDS = (
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs",
    "test_model_forward_features",
    "test_model_forward_intermediates_features",
    "test_model_forward_intermediates",
    "test_model_forward_fx",
    "test_model_backward_fx",
    "test_prune_intermediate_layers_contract",
)
SCRIPTED = ("test_model_forward_torchscript", "test_model_forward_fx_torchscript")
LINE = "torch.jit.script does not compile these networks"


@pytest.fixture(scope="module")
def timms_file(pytestconfig) -> Path:
    """``tests/test_models.py`` from the sdist on PyPI, alone: its folder holds timm itself too."""
    folder = pytestconfig.cache.mkdir(f"timm-{timm.__version__}")
    file = folder / "test_models.py"
    if not file.exists():
        wanted = f"timm=={timm.__version__}"
        only = ("--no-binary", ":all:", "--no-deps", "--quiet", "--dest", folder)
        subprocess.run([sys.executable, "-m", "pip", "download", *only, wanted], check=True)
        (sdist,) = folder.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            member = archive.extractfile(f"timm-{timm.__version__}/tests/test_models.py")
            file.write_bytes(member.read())
    return file


@pytest.fixture(scope="module")
def outcomes(timms_file, tmp_path_factory) -> dict[str, dict[str, str]]:
    """By kind of test and model, the text of the failure, empty for a test that passed."""
    folder = tmp_path_factory.mktemp("timm")
    (folder / "pytest.ini").write_text("[pytest]\n")
    report = folder / "report.xml"
    kinds = [f"{timms_file}::{kind}" for kind in KINDS + SCRIPTED]
    options = ("-p", "tests.backbones.timm_names", "-c", folder / "pytest.ini", "-q")
    done = run_python("-m", "pytest", *options, f"--junitxml={report}", *kinds)
    found = {kind: {} for kind in KINDS + SCRIPTED}
    assert report.exists(), done.stdout + done.stderr
    for case in ElementTree.parse(report).iter("testcase"):
        kind, _, given = case.get("name").partition("[")
        problems = [part for part in case if part.tag in ("failure", "error", "skipped")]
        found[kind][given.rstrip("]")] = " ".join(str(part.get("message")) for part in problems)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_timms_own(kind, outcomes):
    check_models(outcomes[kind])
    assert not {given: text for given, text in outcomes[kind].items() if text}


@pytest.mark.parametrize("kind", SCRIPTED)
def test_those_that_script_end_in_our_line(kind, outcomes):
    check_models(outcomes[kind])
    assert all(LINE in text for text in outcomes[kind].values())


def check_models(outcomes: dict[str, str]) -> None:
    """Each of our models was tested."""
    for name in backbones.MODEL_NAMES:
        assert any(name in given.replace(".", "-").split("-") for given in outcomes), name
