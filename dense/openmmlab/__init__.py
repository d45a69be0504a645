"""What all OpenMMLab packages share: registered backbones, the runner, checkpoints, configs.

It needs mmengine and no other framework, but for :mod:`.mmdetection`, the predictor of MMDetection.
"""
