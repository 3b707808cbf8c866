"""Your own loss in prime-rl, and its head on this package's op:
``trainer.loss.import_path`` names it.

    [trainer.loss]
    type = "custom"
    import_path = "prime_rl_loss.loss"

prime-rl imports this module before the first step, in the trainer's process. The
published methods need no module.
"""

import reweight_ops as rw
from reweight_ops.integrations.prime_rl import loss_fn, patch_head

loss = loss_fn(
    rw.methods.dapo(epsilon_high=0.3).with_weight(rw.weights.AdvantageReweighting(alpha=0.3))
)
PATCH = patch_head()
