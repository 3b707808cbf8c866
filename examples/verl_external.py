"""Your own loss in verl, and its log-probs from hidden states, as an external module.

A training run loads it with ``VERL_USE_EXTERNAL_MODULES=verl_external``::

    VERL_USE_EXTERNAL_MODULES=verl_external python -m verl.trainer.main_ppo \\
        actor_rollout_ref.actor.policy_loss.loss_mode=likely_tokens_first \\
        actor_rollout_ref.model.use_fused_kernels=True \\
        actor_rollout_ref.model.fused_kernel_options.impl_backend=torch ...

The published methods need no module: with reweight_ops installed, verl knows
``loss_mode=rw_dapo``.
"""

import reweight_ops as rw
from reweight_ops.integrations.verl import patch_fused_linear, register

register({"likely_tokens_first": rw.methods.advantage_reweighting(alpha=0.3)})
patch_fused_linear()
