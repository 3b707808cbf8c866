"""Triton kernels: imported only when a GPU call, or a test, asks for them. Installed as ``reweight_ops.triton_kernels``."""
