"""The errors of the package: one base, and one subclass per thing a caller can do about
it.
"""

from __future__ import annotations


class ReweightOpsError(Exception):
    """Base of every error that this package raises on purpose."""


class InvalidCall(ReweightOpsError, ValueError):
    """The call is wrong: a shape, a dtype, a missing tensor, an option that would have
    no effect.
    """


class UnsupportedRequest(ReweightOpsError, NotImplementedError):
    """The call is right, but no backend or plan (or not the named one) can run it. The
    message gives the reason for each.
    """


class BackendUnavailable(ReweightOpsError, ImportError):
    """The named backend is not installed or does not run on this machine. The message
    says what would fix it.
    """
