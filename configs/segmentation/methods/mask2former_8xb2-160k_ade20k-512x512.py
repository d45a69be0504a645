"""Mask2Former, ADE20K, MMSegmentation's 160k of Swin; ``model.backbone.type`` takes any backbone.

Its parts are MMDetection's: ``pip install 'dense-backbones[mmdetection]'``.
"""

_base_ = "mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py"
custom_imports = dict(
    _delete_=True,
    imports=[
        "dense.segmentation",
        "dense.segmentation.dataset",
        "dense.openmmlab.hooks",
        "dense.openmmlab.resuming",
        "dense.openmmlab.runner",
        "mmdet.models",
    ],
)
runner_type = "DenseRunner"
custom_hooks = [dict(type="SeedEveryIteration"), dict(type="StopOnNonFiniteLoss")]
vis_backends = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
visualizer = dict(vis_backends=vis_backends)
model = dict(
    backbone=dict(
        _delete_=True,
        type="swin_tiny",
        init="ms_in1k",
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.3,
        norm="SyncBN",
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
)
train_dataloader = dict(sampler=dict(_delete_=True, type="ResumableSampler", infinite=True))
optim_wrapper = dict(
    # No weight decay on norms and relative position bias tables.
    constructor="DenseOptimWrapperConstructor",
    # A decay_mult here, as in MMSegmentation's, would be of its norms too.
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(_delete_=True, lr_mult=0.1))),
)
train_cfg = dict(type="ResumableIterTrainLoop")
