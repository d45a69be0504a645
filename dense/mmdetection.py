"""Prediction with detectors trained in MMDetection; importing this module needs MMDetection."""

from dense.openmmlab.mmdetection import load_predictor

__all__ = ["load_predictor"]
