"""AReaL with this package's log-probs and a user-defined loss.

Call ``setup()`` in every process that holds the actor's engine, before the first step.
With a launcher that runs the training script in every process, call it at the beginning
of the script.
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
