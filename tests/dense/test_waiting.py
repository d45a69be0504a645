"""A wait that takes long is named, a short one and one of another process is not."""

import time

from dense.waiting import waiting


def test_a_long_wait_is_named_with_its_time(capsys):
    with waiting("reading the annotations", after=0.05):
        time.sleep(0.6)
    printed = capsys.readouterr().err.splitlines()
    assert printed == ["reading the annotations ...", "reading the annotations: 1 s"]


def test_a_short_wait_and_other_ranks_are_silent(capsys, monkeypatch):
    with waiting("a short one"):
        pass
    monkeypatch.setenv("RANK", "1")
    with waiting("another rank's", after=0):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
