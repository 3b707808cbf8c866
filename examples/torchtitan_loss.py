"""torchtitan's RL trainer with a loss of ours: a configuration of torchtitan's own with
another ``loss_fn``.

Put it beside ``torchtitan/experiments/rl/config_registry.py`` and name
``with_our_loss(...)`` of one of its configurations.
"""

import dataclasses
from typing import Any

from reweight_ops.integrations.torchtitan import PolicyLoss

LOSS = PolicyLoss.Config(method="advantage_reweighting", options={"alpha": 0.3})


def with_our_loss(chunked: Any) -> Any:
    """A ``ChunkedLossWrapper.Config`` that calls our loss on every chunk; its own
    ``loss_fn`` was torchtitan's.
    """
    return dataclasses.replace(chunked, loss_fn=LOSS)
