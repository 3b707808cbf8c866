"""The Triton kernels. Nothing here is imported before a Triton backend is asked for."""
