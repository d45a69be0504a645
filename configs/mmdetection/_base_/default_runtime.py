"""What every run has: the backbones by name, a runner for CPU and GPU, logs for TensorBoard."""

_base_ = "mmdet::_base_/default_runtime.py"
# The names are OpenMMLab's, whichever package asks: this import needs no MMSegmentation.
custom_imports = dict(
    imports=["dense.segmentation", "dense.openmmlab.hooks", "dense.openmmlab.runner"]
)
runner_type = "DenseRunner"
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
custom_hooks = [dict(type="StopOnNonFiniteLoss")]
visualizer = dict(vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")])
