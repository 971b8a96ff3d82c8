"""Each operation of kernels/, verified and timed."""
