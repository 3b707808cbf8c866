"""A setup hook for OpenRLHF's ray workers: this package's log-probs and a user-defined
loss.

    ray job submit --runtime-env-json '{"worker_process_setup_hook":
        "openrlhf_setup.setup", "env_vars": {"PYTHONPATH": "examples"}}' \\
        -- python -m openrlhf.cli.train_ppo_ray ...
"""

import reweight_ops as rw
from reweight_ops.integrations.openrlhf import patch

SPEC = rw.methods.verl("dppo_kl", loss_agg_mode="token-mean")


def setup() -> None:
    """Patch this process; only the actor's process builds a loss."""
    from openrlhf.trainer.ray import ppo_actor

    patch(spec=SPEC, ppo_actor=ppo_actor)
