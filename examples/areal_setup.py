"""AReaL with our log-probs and a loss of ours: ``setup()`` in every process that holds the actor's engine, before the first step.

With a launcher that runs the training script in every process, call it at the script's beginning.
"""

import reweight_ops as rw
from reweight_ops.integrations.areal import patch_logprobs, patch_loss
from reweight_ops.integrations.patching import Patch

SPEC = rw.methods.advantage_reweighting(alpha=0.3)


def setup() -> tuple[Patch, Patch]:
    """Patch this process."""
    from areal.engine import fsdp_engine
    from areal.trainer.ppo import actor

    return patch_logprobs(fsdp_engine), patch_loss(SPEC, actor=actor)
