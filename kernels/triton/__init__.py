"""Triton kernels, one module per op; each offers ``forward`` and, where it has one, ``backward``."""
