"""SkyRL with this package's losses: SkyRL's own entry point after two lines.

    python -m skyrl_main \\
        trainer.algorithm.policy_loss_type=likely_tokens_first \\
        trainer.algorithm.loss_reduction=token_mean ...

The published methods are `rw_dapo`, `rw_gspo`, ... SkyRL sends registered losses to its
workers, whose environment also needs reweight_ops.
"""

import reweight_ops as rw
from reweight_ops.integrations.skyrl import register

register()
register({"likely_tokens_first": rw.methods.advantage_reweighting(alpha=0.3)})

if __name__ == "__main__":
    from skyrl.train.entrypoints.main_base import main

    main()
