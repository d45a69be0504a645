"""Prediction with detectors trained in MMDetection, which it needs."""

from dense.openmmlab.mmdetection import load_predictor

__all__ = ["load_predictor"]
