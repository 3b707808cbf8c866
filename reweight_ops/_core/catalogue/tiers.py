"""Tiers: how far an entry is from what everyone runs."""

from __future__ import annotations

#: The tiers, nearest first.
TIERS = {
    "core": "TRL or verl ships it, under this or another name",
    "catalogue": "a published method",
    "derived": "no formula was found: ours, after the paper's description",
}

_CORE = {
    "policy_loss": "ppo dual_clip_ppo grpo dr_grpo dapo cispo sapo luspo vespo gspo gspo_token "
    "gmpo gpg dppo_tv dppo_kl clip_cov kl_cov reinforce top_entropy two_sided_clip opsm "
    "decoupled_ppo sft dft kto",
    "token_weight": "tis sequence_tis icepop mis geometric_mask",
    "advantage": "grpo dr_grpo rloo gae reinforce_plus_plus reinforce_plus_plus_baseline remax "
    "opo gpg gdpo grpo_passk otb tir_otb",
    "sample_weight": "dynamic_sampling",
    "pair_loss": "dpo cdpo robust_dpo hinge ipo exo nca bco sppo apo aot discopop f_dpo ld_dpo "
    "mpo wpo rpo irpo simpo cpo orpo alpha_po tpo",
    "divergence": "token_divergence",
}
#: The entries of the first tier, by kind (TRL 1.16, verl 0.9.1).
CORE = {kind: frozenset(names.split()) for kind, names in _CORE.items()}


def tier_of(kind: str, name: str, certainty: str) -> str:
    """Return the tier of an entry."""
    if certainty == "derived":
        return "derived"
    return "core" if name in CORE.get(kind, ()) else "catalogue"
