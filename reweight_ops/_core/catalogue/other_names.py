"""Names of entries that neither their full name nor their paper's title prints.

Trainers, other papers and surveys use these names.
"""

from __future__ import annotations

#: Maps a kind and a name of an entry to its other names.
OTHER_NAMES: dict[tuple[str, str], tuple[str, ...]] = {
    ("policy_loss", "a_star_po"): ("A2PO",),
    ("advantage", "a_star_po"): ("A2PO",),
    ("policy_loss", "dro"): ("quadratic DRO", "DRO (quadratic)"),
    ("policy_loss", "glm5"): ("rollout_is", "double-sided rollout mask", "double-sided IcePop"),
    ("policy_loss", "kto"): ("unpaired preference",),
    ("policy_loss", "sdar"): ("self-distillation",),
    ("policy_loss", "vapo"): ("positive NLL", "VAPO's positive NLL"),
    ("token_weight", "divergence_gate"): ("binary-KL gate", "TV gate", "is_correction_gating"),
    ("token_weight", "geometric_mask"): ("geometric TIS", "geometric sequence-masked TIS"),
    ("token_weight", "mis"): ("sequence-masked TIS", "seq-mask-TIS"),
    ("token_weight", "rlsd"): ("self-distillation",),
    ("token_weight", "tr_grpo"): ("GRPO-SG",),
    ("sample_weight", "selective_rehearsal"): ("Advantage Model",),
    ("divergence", "kd"): ("self-distillation",),
    ("schedule", "canon"): ("First-Inter-Later-Intra", "First-Intra-Later-Inter"),
    ("schedule", "hapo_temperature"): ("adaptive temperature sampling",),
}
