"""Causal attention: `operation` is the function, the others its Triton kernels."""
