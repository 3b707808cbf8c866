"""One of torchtitan's RL configurations with a loss of this package.

Put the file beside ``torchtitan/experiments/rl/config_registry.py``. Wrap one of that
file's configurations in ``with_our_loss(...)``.
"""

import dataclasses
from typing import Any

from reweight_ops.integrations.torchtitan import PolicyLoss

LOSS = PolicyLoss.Config(method="advantage_reweighting", options={"alpha": 0.3})


def with_our_loss(chunked: Any) -> Any:
    """Return a ``ChunkedLossWrapper.Config`` that calls this package's loss on every
    chunk, in place of torchtitan's.
    """
    return dataclasses.replace(chunked, loss_fn=LOSS)
