"""A loss of your own in NeMo-RL: one line in ``examples/run_grpo.py``, after ``setup(...)`` has returned.

    loss_fn = nemo_rl_loss.loss_fn(master_config)       # in place of the one that setup made
    grpo_train(policy, ..., loss_fn, ...)

The environment of the policy's workers needs reweight_ops too: NeMo-RL sends them the loss.
"""

from typing import Any

import reweight_ops as rw
from reweight_ops.integrations.nemo_rl import PolicyLoss


def loss_fn(master_config: Any) -> PolicyLoss:
    """Likely tokens first, with NeMo-RL's KL, from logits."""
    return PolicyLoss(master_config, rw.methods.advantage_reweighting(alpha=0.3), logits=True)
