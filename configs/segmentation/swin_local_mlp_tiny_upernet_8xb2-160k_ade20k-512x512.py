"""UPerNet, ADE20K, Swin-Local-MLP tiny (not in the paper's tables)."""

_base_ = "./_base_/tiny.py"
model = dict(
    backbone=dict(type="swin_local_mlp_tiny", init="checkpoints/swin_local_mlp_tiny_in1k.pth")
)
