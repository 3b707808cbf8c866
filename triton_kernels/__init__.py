"""Triton kernels; installed as ``reweight_ops.triton_kernels``."""

from reweight_ops.errors import BackendUnavailable

# Here, before any module of kernels: whoever imports one of them, or Triton from here, gets this error, in whatever order.
try:
    import triton as triton
except ImportError as error:
    raise BackendUnavailable(f"Triton cannot be imported ({error}); pip install triton (Linux, or triton-windows).") from error
