"""The command of the tables in dense/export/README.md prints what it measured."""

import pytest

pytest.importorskip("openvino")


def table(printed: str) -> list[list[str]]:
    """Head and rows; MMEngine's logger prints there too, once a test has started one."""
    head, _, *rows = [line for line in printed.splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in (head, *rows)]


@pytest.mark.e2e
def test_rows_of_a_family(capsys):
    from dense.analysis.export_table import main
    from dense.export.files import FORMATS

    main(["--families", "dw_conv", "--side", "64", "--no-latency"])
    head, *rows = table(capsys.readouterr().out)
    assert head == ["backbone", "format", "largest relative error", "MB"]
    assert [row[:2] for row in rows] == [["`dw_conv_nano`", kind] for kind in FORMATS]
    assert all(float(row[2]) < 1e-4 and 1 < float(row[3]) < 10 for row in rows)


@pytest.mark.e2e
def test_rows_of_a_detector(capsys):
    pytest.importorskip("detectron2")
    from dense.analysis.export_table import main

    main(["--detectors", "--families", "dw_conv", "--no-latency"])
    head, *rows = table(capsys.readouterr().out)
    assert head == ["backbone", "format", "detections", "boxes, pixels", "scores", "masks", "MB"]
    assert [row[:2] for row in rows] == [["`dw_conv_nano`", k] for k in ("onnx", "openvino")]
    for _, _, count, box, score, mask, size in rows:
        assert int(count) > 50 and float(box) < 0.01 and float(score) < 1e-4 > float(mask)
        assert 5 < float(size) < 20


FILES = [
    *(["bf16", "OpenVINO"], ["fp16", "OpenVINO"]),
    *(["int8", "OpenVINO"], ["int8", "ONNX Runtime"]),
]


@pytest.mark.e2e
def test_smaller_numbers_of_a_family(capsys):
    from dense.analysis.export_table import main

    main(["--smaller", "--families", "dw_conv", "--side", "64", "--calibrated", "2"])
    _, *rows = table(capsys.readouterr().out)
    assert [row[1:3] for row in rows] == FILES
    sizes = [float(row[3]) for row in rows]
    # In megabytes: half and about a quarter of float32's 5.2, norms and biases apart.
    assert sizes[:2] == pytest.approx([2.7, 2.7], abs=0.2)
    assert sizes[2:] == pytest.approx([1.6, 1.6], abs=0.4)
    assert all(float(row[4]) > 0 for row in rows)


@pytest.mark.e2e
def test_smaller_numbers_of_a_checkpoint(classifier, photos, capsys):
    from dense.analysis.export_table import main

    words = ["--smaller", "--checkpoints", str(classifier), "--photos", str(photos)]
    main([*words, "--calibrated", "3"])
    _, *rows = table(capsys.readouterr().out)
    assert [row[1:3] for row in rows] == FILES and {row[0] for row in rows} == {"`small`"}
    for row in rows:
        cosines = [float(value) for value in row[3].split(", ")]
        assert len(cosines) == 4 and 0.98 < min(cosines) <= 1
        assert (row[4] == "-") is (row[1] != "int8")
