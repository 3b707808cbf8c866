"""Your own loss in NeMo-RL: one line in ``examples/run_grpo.py``, after ``setup(...)``
has returned.

    # instead of the loss that setup returned
    loss_fn = nemo_rl_loss.loss_fn(master_config)
    grpo_train(policy, ..., loss_fn, ...)

NeMo-RL sends the loss to the policy's workers, whose environment also needs
reweight_ops.
"""

from typing import Any

import reweight_ops as rw
from reweight_ops.integrations.nemo_rl import PolicyLoss


def loss_fn(master_config: Any) -> PolicyLoss:
    """Return a loss that trains likely tokens first, with NeMo-RL's KL, from logits."""
    return PolicyLoss(master_config, rw.methods.advantage_reweighting(alpha=0.3), logits=True)
