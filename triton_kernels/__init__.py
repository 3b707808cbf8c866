"""Triton kernels; installed as ``reweight_ops.triton_kernels``."""

from reweight_ops.errors import BackendUnavailable

# This stands before every module of kernels: an import of any of them, or of Triton
# from here, raises this error in every order.
try:
    import triton as triton
except ImportError as error:
    raise BackendUnavailable(
        f"Triton cannot be imported ({error}); pip install triton (Linux, or triton-windows)."
    ) from error
