"""What verl loads (entry point group ``verl.plugins``): importing this registers every
method and advantage estimator.

verl logs a plugin that fails at the debug level only, and then knows no ``rw_...``
name; so the reason is a warning here.
"""

import warnings

try:
    from . import register, register_advantages
except Exception as error:
    warnings.warn(f"reweight_ops could not register its losses with verl: {error}", stacklevel=2)
    raise

register()
register_advantages()
