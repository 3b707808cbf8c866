"""TRL's ``GRPOTrainer`` (1.15 and later) on our ops, as a subclass or a patch.

Two hooks. The default one computes per-token log-probs and entropies and keeps every
loss, metric and scaling of TRL. ``fuse_loss=True`` computes the whole loss and thereby
any of our methods::

    trainer = ReweightGRPOTrainer(
        model=..., reward_funcs=..., args=GRPOConfig(...), train_dataset=...
    )
    # TRL's loss, fused
    trainer = ReweightGRPOTrainer(..., fuse_loss=True)
    # TRL's loss, reweighted
    weight = rw.weights.AdvantageReweighting(alpha=0.3)
    trainer = ReweightGRPOTrainer(..., reweight=weight)
    # another loss
    trainer = ReweightGRPOTrainer(..., spec=rw.methods.gspo_token())
    # one loss for each pass of GRPOConfig(num_iterations=2)
    lopti = [rw.methods.lopti("low"), rw.methods.lopti("high")]
    trainer = ReweightGRPOTrainer(..., spec=lopti)
    # all that a paper trains with
    trainer = ReweightGRPOTrainer(..., recipe="canon")
    # TRL's loss, other advantages
    trainer = ReweightGRPOTrainer(..., advantages="qae")

    with patch_trl(fuse_loss=True):      # scripts that build GRPOTrainer themselves
        main()
    # any trainer: the head that GRPO, RLOO, DPO, KTO, SFT and AsyncGRPO share, and
    # that of distillation
    with patch_trl(heads=True):
        main()

Both work from hidden states and the head's weight (``rw.linear_token_logps``,
``rw.linear_policy_loss``), so that ``[B, T, V]`` logits never exist, as in stock TRL.
Heads that are more than a weight (``lm_head="auto"``: any that the linear ops do not
know) go through their logits. A LoRA adapter on the head, which TRL refuses because its
fused head would ignore it, is trained.

**What it leaves to TRL** is never silent: ``trainer.delegated_calls`` counts it by
reason, ``trainer.fused_calls`` counts what ran here, and each reason is reported once
by a warning. With ``spec=`` or ``reweight=`` handing over would train another method,
so it is an error.
"""

from __future__ import annotations

from ...errors import BackendUnavailable

try:
    from trl.trainer import grpo_trainer as _grpo_trainer  # noqa: F401
except ImportError as error:
    raise BackendUnavailable(
        "reweight_ops.integrations.trl needs TRL: pip install 'trl>=1.15'"
    ) from error

from .library import LIBRARY, check_signatures
from .patch import patch_trl
from .trainer import ReweightGRPOTrainer

__all__ = ["LIBRARY", "ReweightGRPOTrainer", "check_signatures", "patch_trl"]
