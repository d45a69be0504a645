"""Code shared by all OpenMMLab packages: backbone registration, runner, checkpoints, configs.

It needs mmengine only; :mod:`.mmdetection`, MMDetection's predictor, needs MMDetection too.
"""
