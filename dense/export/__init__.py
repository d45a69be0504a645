"""Export of trained networks to ONNX, OpenVINO and torch.export, checked on photos.

``tools/export.py`` is the command line, ``dense/export/README.md`` the page. This import needs no
framework, and :class:`.files.Runner` no PyTorch.
"""
