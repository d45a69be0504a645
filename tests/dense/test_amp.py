import pytest
import torch

from dense.amp import best_half, warn_of_float16
from tests.support import build


@pytest.mark.parametrize(
    ("name", "dtype", "warns"),
    [
        ("i_d_dw_conv_nano", torch.float16, True),
        ("i_d_dw_conv_nano", torch.bfloat16, False),
        ("d_dw_conv_nano", torch.float16, False),
    ],
)
def test_float16_with_predicted_kernels_of_every_position_is_warned_of(name, dtype, warns, caplog):
    warn_of_float16(build(name), dtype, "train.amp.precision")
    assert ("train.amp.precision=bfloat16, or no AMP, is safer" in caplog.text) is warns


@pytest.mark.parametrize(("available", "native"), [(True, True), (True, False), (False, True)])
def test_bfloat16_is_the_default_where_a_gpu_computes_in_it(monkeypatch, available, native):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)

    def supported(including_emulation=True):
        # A V100 emulates it.
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert best_half() == ("bfloat16" if available and native else "float16")
