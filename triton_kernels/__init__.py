"""Triton kernels; installed as ``reweight_ops.triton_kernels``."""
