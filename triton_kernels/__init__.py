<<<<<<< HEAD
"""Triton kernels; installed as ``reweight_ops.triton_kernels``."""
=======
"""The Triton kernels. Nothing here is imported before a Triton backend is asked for."""
>>>>>>> codegen
