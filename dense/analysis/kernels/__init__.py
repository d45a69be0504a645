"""What compiled Triton kernels use and how they access memory, read off the generated code."""
