"""OpenRLHF with our log-probs and a loss of ours, in every ray worker: a setup hook.

    ray job submit --runtime-env-json '{"worker_process_setup_hook": "openrlhf_setup.setup", "env_vars": {"PYTHONPATH": "examples"}}' \\
        -- python -m openrlhf.cli.train_ppo_ray ...
"""

import reweight_ops as rw
from reweight_ops.integrations.openrlhf import patch

SPEC = rw.methods.verl("dppo_kl", loss_agg_mode="token-mean")


def setup() -> None:
    """Patch this process; only the actor's ever builds a loss."""
    from openrlhf.trainer.ray import ppo_actor

    patch(spec=SPEC, ppo_actor=ppo_actor)
