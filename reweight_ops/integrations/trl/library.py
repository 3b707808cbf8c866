"""What the hooks need TRL to be: its version, the signatures of the methods that they
override, and the source of the loss that they reproduce.
"""

from __future__ import annotations

import trl
from trl.trainer.grpo_trainer import GRPOTrainer

from ..patching import check_signature
from ..trainers import check_version

#: The leading parameters of the two methods that are overridden; any further one must
#: be optional.
SIGNATURES = {
    "_get_per_token_logps_and_entropies": (
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
    ),
    "_compute_loss": ("self", "model", "inputs"),
}

#: The signatures of the further methods that a recipe needs.
ROLLOUT_SIGNATURES = {
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_and_score_completions": ("self", "inputs"),
}

#: Source of the ``_compute_loss`` that ``fuse_loss=True`` reproduces: TRL 1.15.0 and
#: 1.16.0.
KNOWN_LOSSES = ("80295546bbdbf6f7",)


def check_signatures(trainer_class: type) -> None:
    """Raise :class:`BackendUnavailable` if TRL's methods are not the ones that the
    hooks override.
    """
    for name, expected in (SIGNATURES | ROLLOUT_SIGNATURES).items():
        check_signature(f"TRL {trl.__version__}", trainer_class, name, expected)


#: The installed version, for messages.
LIBRARY = check_version("TRL")
check_signatures(GRPOTrainer)
