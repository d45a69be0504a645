"""Tables 1 and 7, cell by cell, and appendix B's matrix forms on the same Jacobians."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from backbones import mixers
from dense.analysis import complexity_tables, paper, properties
from dense.analysis.properties import CHANNELS, KERNEL, SIZE, Measured
from tests.support import ROOT, load_tool

# Measured on a prototype that shares no code with the package.
EXPECTED = """
Local MLP, a matrix a window | 9 of 144 | block | yes | 2 | no | no | - | no | vector
Local MLP, one matrix | 9 of 144 | block | yes | 2 | every 3 | no | - | by 3 | vector
Local MLP, one matrix a channel | 9 of 144 | block | yes | 1 | every 3 | no | - | by 3 | vector
Local MLP, one matrix, shifted | 9 of 144 | block | yes | 2 | every 3 | no | - | by 3 | vector
Local attention | 9 of 144 | block | yes | 2 | no | yes | its window | by 3 | vector
Local attention, shifted | 9 of 144 | block | yes | 2 | no | yes | its window | by 3 | vector
Local attention, no position bias | 9 of 144 | block | yes | 2 | no | yes | its window | by 3 | set
Sliding attention | 9 of 144 | centred | yes | 2 | no | yes | its window | any | vector
Sliding attention, no position bias | 9 of 144 | centred | yes | 2 | no | yes | its window | any | set
DW-Conv. | 9 of 144 | centred | yes | 1 | all | no | - | any | vector
DW-Conv., channels shared | 9 of 144 | centred | yes | 2 | all | no | - | any | vector
DW-Conv., channels shared, positions own | 9 of 144 | centred | yes | 2 | no | no | - | no | vector
D-DW-Conv. | 9 of 144 | centred | yes | 1 | all | yes | the whole map | any | vector
I-D-DW-Conv. | 9 of 144 | centred | yes | 2 | no | yes | itself | any | vector
Conv. | 9 of 144 | centred | no | - | all | no | - | any | vector
MLP | all | - | no | - | no | no | - | no | vector
Attention | all | - | yes | 2 | no | yes | its window | no | vector
Spatial-mixing MLP | all | - | yes | 4 | no | no | - | no | vector
1x1 Conv. | one | - | no | - | all | no | - | any | -
"""  # noqa: E501
ROWS = {name: cells for name, *cells in (r.split(" | ") for r in EXPECTED.strip().splitlines())}


@pytest.fixture(scope="module")
def found():
    return properties.measure()


@pytest.fixture(scope="module")
def weights():
    """``W`` of a module by name, rows and columns channel by channel: ``(C, C, HW, HW)``."""

    def of(name: str) -> torch.Tensor:
        whole = Measured(properties.modules()[name]).weights
        return whole.permute(2, 5, 0, 1, 3, 4).flatten(4).flatten(2, 3)

    return of


def test_a_readme_without_the_tables_is_named(monkeypatch, tmp_path, capsys):
    (tmp_path / "README.md").write_text("no tables")
    tool = load_tool("properties")
    assert tool.main([]) == 0 and "| " in capsys.readouterr().out
    monkeypatch.setattr(tool, "README", tmp_path / "README.md")
    assert tool.main(["--write"]) == 1
    assert capsys.readouterr().err.startswith(f"properties: {tmp_path / 'README.md'}")


def test_the_tables_are_printed_and_written_once(found, monkeypatch, tmp_path, capsys):
    readme, tool = tmp_path / "README.md", load_tool("properties")
    begin, end = complexity_tables.markers("properties")
    readme.write_text(f"before\n\n{begin}\nold\n{end}\n\nafter\n")
    monkeypatch.setattr(properties, "measure", lambda: found)
    monkeypatch.setattr(tool, "README", readme)
    tables = properties.tables(found)
    printed = "".join(f"{table.markdown()}\n\n" for table in tables)
    written = complexity_tables.block(tables, "properties")
    for words, text, said in (
        ([], f"{begin}\nold\n{end}", ""),
        (["--write"], written, f"{readme} written\n"),
        (["--write"], written, f"{readme} was current\n"),
    ):
        assert tool.main(words) == 0
        assert tuple(capsys.readouterr()) == (printed, said)
        assert readme.read_text() == f"before\n\n{text}\n\nafter\n"


@pytest.mark.parametrize("name", ROWS)
def test_every_cell_of_the_measured_table(found, name):
    [table, _] = properties.tables({name: found[name]} | found)
    cells = {row[0]: row[1:] for row in table.cells()}
    assert cells[name] == ROWS[name]


def test_all_modules_are_expected(found):
    assert list(found) == list(ROWS)


def test_the_papers_marks(found):
    [_, table] = properties.tables(found)
    assert [row[0] for row in table.cells()] == list(paper.TABLE_7)
    for name, *cells in table.cells():
        for cell in cells:
            measured, printed = cell.split(" / ")
            assert measured == printed, (name, cells)
    assert set(paper.TABLE_1) < set(paper.TABLE_7)


def test_the_readme_has_the_tables(found):
    written = complexity_tables.read_block(ROOT / "backbones/README.md", "properties")
    assert written == complexity_tables.block(properties.tables(found), "properties")


# Appendix B: equations 10 to 16


def toeplitz_by_blocks(matrix: torch.Tensor) -> bool:
    """Whether a ``(HW, HW)`` matrix is Toeplitz in rows of the map and in columns (eq. 10)."""
    blocks = matrix.unflatten(0, (SIZE, SIZE)).unflatten(2, (SIZE, SIZE))
    along_rows = blocks[1:, :, 1:] - blocks[:-1, :, :-1]
    along_columns = blocks[:, 1:, :, 1:] - blocks[:, :-1, :, :-1]
    return bool(along_rows.abs().max() < 1e-9 and along_columns.abs().max() < 1e-9)


def of_channels_only(weights: torch.Tensor) -> bool:
    """Whether the blocks off the diagonal are 0 (eqs. 12, 15)."""
    off = ~torch.eye(CHANNELS, dtype=torch.bool)
    return not weights[off].any()


def test_convolution_is_toeplitz_in_every_block(weights):
    found = weights("Conv.")
    assert all(toeplitz_by_blocks(block) for row in found for block in row)
    assert not of_channels_only(found)
    # Not circulant, as equation 10 draws it: zeros beyond the border, and 9 weights a row.
    assert (found[0, 0] != 0).sum(1).unique().tolist() == [4, 6, 9]


def test_depthwise_convolution_is_block_diagonal_and_toeplitz(weights):
    for name in ("DW-Conv.", "D-DW-Conv."):
        found = weights(name)
        assert of_channels_only(found)
        assert all(toeplitz_by_blocks(found[c, c]) for c in range(CHANNELS))
        assert (found[0, 0] - found[1, 1]).abs().max() > 1e-3
    assert not toeplitz_by_blocks(weights("I-D-DW-Conv.")[0, 0])


def test_spatial_mixing_is_the_kronecker_product_of_the_identity(weights):
    found = weights("Spatial-mixing MLP")
    whole = found.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    assert (whole - torch.kron(torch.eye(CHANNELS).double(), found[0, 0])).abs().max() < 1e-12


def test_a_1x1_convolution_is_the_kronecker_product_with_the_identity(weights):
    found = weights("1x1 Conv.")
    whole = found.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    pointwise = found[:, :, 0, 0].contiguous()
    identity = torch.eye(SIZE * SIZE).double()
    assert (whole - torch.kron(pointwise, identity)).abs().max() < 1e-12


def test_local_attention_repeats_attention_over_the_windows(weights):
    found = weights("Local attention")
    assert of_channels_only(found)
    # Positions in the order of windows: one dense 9x9 block for each window.
    order = torch.arange(SIZE * SIZE).view(SIZE // KERNEL, KERNEL, SIZE // KERNEL, KERNEL)
    order = order.transpose(1, 2).flatten()
    matrix = found[0, 0][order][:, order]
    inside = torch.block_diag(*[torch.ones(KERNEL**2, KERNEL**2)] * (SIZE // KERNEL) ** 2).bool()
    assert (matrix[~inside] == 0).all() and (matrix[inside] > 0).all()
    # Softmax: each row sums to 1.
    assert (matrix.sum(1) - 1).abs().max() < 1e-9


# The definitions, on operators that are known


def test_parameters_and_statistics_are_drawn_as_said():
    """By normal distributions of 0.5; biases of norms are 3 higher, variances 0.5 or more."""
    norm = nn.BatchNorm2d(4096)
    first, same = Measured(norm), Measured(nn.Identity())
    assert not norm.training and not any(p.requires_grad for p in norm.parameters())
    assert norm.weight.dtype == torch.float64 and norm.num_batches_tracked == 0
    for drawn, mean in ((norm.weight, 0), (norm.bias, 3), (norm.running_mean, 0)):
        assert drawn.mean() == pytest.approx(mean, abs=0.04)
        assert drawn.std() == pytest.approx(0.5, rel=0.05)
    # The mean of the absolute values of a normal distribution of 0.5, above 0.5.
    assert norm.running_var.min() >= 0.5
    assert norm.running_var.mean() == pytest.approx(0.5 + 0.5 * (2 / torch.pi) ** 0.5, abs=0.04)
    assert first.x.shape == (SIZE, SIZE, CHANNELS) and first.x.dtype == torch.float64
    assert first.x.std() == pytest.approx(1, rel=0.1)
    assert same.x.equal(Measured(nn.Identity()).x)
    assert not same.x.equal(Measured(nn.Identity(), seed=1).x)


def test_a_short_measurement_shows_no_bar(monkeypatch, capsys):
    monkeypatch.setattr(properties, "modules", lambda: {"1x1 Conv.": nn.Linear(4, 4)})
    assert properties.measure()["1x1 Conv."].full
    assert capsys.readouterr().err == ""


class Known(nn.Module):
    """A module that applies ``mix`` to ``(B, H, W, C)`` maps."""

    def __init__(self, mix):
        super().__init__()
        self.mix = mix

    def forward(self, x):
        return self.mix(x)


def test_a_module_with_two_operators_is_refused():
    layer = properties.modules()["DW-Conv."]
    with pytest.raises(ValueError, match="calls 2 operators: depthwise_conv, depthwise_conv"):
        properties.operator(nn.Sequential(layer, layer), torch.zeros(SIZE, SIZE, CHANNELS))


@pytest.mark.parametrize("conv", ["static", "post"])
def test_attention_with_convolutions_is_an_operator_of_its_values(conv):
    mixer = mixers.WindowAttention.at(
        CHANNELS, 0, 0, (SIZE, SIZE), num_heads=(2,), window_size=KERNEL, conv=conv
    )
    weights = Measured(mixer).weights[6, 6]
    # Softmax: the weights of a position's window are positive and sum to 1, channel by channel.
    own = weights.diagonal(dim1=0, dim2=3)
    assert (own.sum((0, 1)) - 1).abs().max() < 1e-9 and (own >= 0).all()
    assert (own > 0).sum((0, 1)).unique().tolist() == [KERNEL**2]


def test_a_gate_of_the_image_is_dynamic_by_the_whole_map_and_full():
    measured = Measured(Known(lambda x: x * x.mean((1, 2), keepdim=True).detach())).properties()
    assert measured.full and not measured.non_local and measured.dynamic
    assert measured.source == "the whole map" and measured.equivariant == 1
    assert measured.channels == 1 and measured.period == 1 and measured.ordered is None


def test_pooling_of_a_window_is_a_static_set():
    pool = nn.AvgPool2d(KERNEL, 1, KERNEL // 2)
    measured = Measured(properties.ChannelsLast(pool)).properties()
    assert not measured.dynamic and measured.ordered is False and measured.channels == CHANNELS


# The picture


@pytest.fixture(scope="module")
def tool():
    return load_tool("show_kernels")


@pytest.fixture
def photo(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (90, 130, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("family", ["swin", "d_dw_conv", "i_d_dw_conv"])
def test_a_picture_from_a_checkpoint(tool, photo, tmp_path, family):
    torch.manual_seed(0)
    model = timm.create_model(f"{family}_nano")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    out = tmp_path / "kernels.png"
    words = [photo, "--model", f"{family}_nano", "--checkpoint", tmp_path / "weights.pth"]
    words += ["--out", out, "--at", "60,40", "129,89", "--short-side", "64", "--channels", "2"]
    assert tool.main([str(word) for word in words]) == 0
    picture = np.asarray(Image.open(out).convert("RGB"))
    assert picture.std() > 10
    # A row for each position: the photo and two channels, each 286 pixels a side.
    assert picture.shape[:2] == pytest.approx((2 * 286, 3 * 286), abs=2)
    # Another position of the same photo has another picture.
    words[words.index("60,40")] = "10,80"
    assert tool.main([str(word) for word in words]) == 0
    assert (np.asarray(Image.open(out).convert("RGB")) != picture).any()


def test_the_picture_of_an_ablation(tool, photo, tmp_path, monkeypatch):
    """Sliding attention has the entries of Swin's, and another window."""
    torch.save(timm.create_model("swin_nano").state_dict(), tmp_path / "weights.pth")
    drawn = []
    monkeypatch.setattr(tool, "picture", lambda *given: drawn.append(given[4]))
    words = [photo, "--model", "swin_nano", "--checkpoint", tmp_path / "weights.pth"]
    words += ["--at", "65,45", "--short-side", "64", "--channels", "1", "--stage", "1"]
    for more in ([], ["--ablation", "swin_sliding"]):
        assert tool.main([str(word) for word in (*words, *more)]) == 0
    # Row 8 and column 11 of 16x23: a window begins at 7 and 7, one around the position at 5 and 8.
    corners = [[int(i.min()) for i in weights[0, 0].nonzero()] for weights in drawn]
    assert corners == [[7, 7], [5, 8]]


def test_the_drawn_weights_are_the_predicted_kernels(tool):
    torch.manual_seed(0)
    model = timm.create_model("d_dw_conv_nano").eval().requires_grad_(False)
    mixer, x = tool.mixer_and_input(model, torch.randn(1, 3, 64, 96), 1, 1)
    [[one, other]] = tool.mixing_weights(mixer, x, [(8, 9)], [0, 5])
    hidden = torch.relu(mixer.in_norm(mixer.in_proj(x[None]).permute(0, 3, 1, 2)))
    kernels = mixer.kernels(hidden.permute(0, 2, 3, 1))[0]
    for drawn, kernel in ((one, kernels[0]), (other, kernels[5])):
        around = drawn[5:12, 6:13]
        assert np.abs(around - kernel.numpy()).max() < 1e-6
        assert np.abs(drawn).sum() == pytest.approx(np.abs(around).sum())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--model", "swin_nano", "--stage", "5"], "--stage 5: 1 to 4 exist"),
        (["--model", "swin_nano", "--block", "9"], "--block 9: stage 2 has blocks 1 to 1"),
        (["--model", "swin_nano", "--at", "500,5"], "--at 500,5 is outside of the 130x90 pixels"),
        (["--model", "nonsense"], "Unknown model"),
        (["--model", "swin_nano", "--ablation", "swin_slidin"], "near it are swin_sliding"),
    ],
)
def test_what_is_wrong_is_one_line(tool, photo, tmp_path, capsys, words, reason):
    torch.save(timm.create_model("swin_nano").state_dict(), tmp_path / "weights.pth")
    out = tmp_path / "kernels.png"
    words = [photo, "--checkpoint", tmp_path / "weights.pth", "--out", out, *words]
    assert tool.main([str(word) for word in words]) == 1
    said = capsys.readouterr().err
    assert said.startswith("show_kernels: ") and reason in said and said.count("\n") == 1
    assert not out.exists()
