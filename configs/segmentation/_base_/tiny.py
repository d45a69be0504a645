"""UPerNet on ADE20K, tiny; a recipe adds the backbone and its initial weights."""

_base_ = [
    "./models/upernet.py",
    "./datasets/ade20k.py",
    "./schedules/schedule_160k.py",
    "./default_runtime.py",
]
model = dict(
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
