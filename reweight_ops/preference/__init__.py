"""Losses of pairs of completions. A published one is a function that returns a
:class:`PairSpec`; :func:`preference_loss` evaluates it.

    L = loss_scale · mean_i w_i · Σ_k coef_k · ℓ_k(pair i)

A spec is a score (how tokens become a sequence's score), terms (functions of margins)
and detached weights. Each is a record with one formula on ``[P]`` vectors, in
``scores.py``, ``losses.py`` and ``weights.py``.
"""

from typing import TYPE_CHECKING

from .._core.catalogue.search import published_names
from .._core.engine.pairs import PreferenceLossOutput
from .._core.losses.preference import (
    linear_preference_loss,
    preference_loss,
    preference_loss_from_logps,
)
from .._core.rows.pairs import Pairs, Sequences, Side
from .._core.spec.pair_parts import PairLoss, PairWeight, Score
from .._core.spec.pairs import PairSpec, PairTerm
from .combined import alpha_po, aot, f_dpo, irpo, ld_dpo, mpo, tpo
from .losses import (
    Aot,
    ApoDown,
    ApoZero,
    BcoPair,
    ChosenNll,
    Discopop,
    Ensemble,
    ExoPair,
    Hinge,
    Inconsistency,
    Ipo,
    ListLikelihood,
    MaskNorm,
    NcaPair,
    OddsRatio,
    Robust,
    SearchConfidence,
    Sigmoid,
    SoftLabel,
    SppoHard,
    SquaredNash,
)
from .masks import from_first_difference, mapo_masks, rank_consistency
from .methods import (
    apo,
    bco,
    cdpo,
    cpo,
    cream,
    discopop,
    dpo,
    dpo_gamma,
    ens_loss,
    exo,
    hinge,
    inpo,
    ipo,
    madpo,
    mcts_dpo,
    nca,
    no_sft_ratio_w_unlikelihood,
    orpo,
    rank_list,
    robust_dpo,
    rpo,
    scir,
    simpo,
    sparse_po,
    sppo,
    unlikelihood,
    wpo,
)
from .scores import (
    AlphaLikelihood,
    Likelihood,
    LikelihoodAgainstUnlikelihood,
    LogRatio,
    MaskedLogRatio,
)
from .trl import trl
from .unpaired import kto_baseline
from .weights import Agreement, MarginAdaptive, SampledAlignment

__all__ = [
    "Agreement",
    "AlphaLikelihood",
    "Aot",
    "ApoDown",
    "ApoZero",
    "BcoPair",
    "ChosenNll",
    "Discopop",
    "Ensemble",
    "ExoPair",
    "Hinge",
    "Inconsistency",
    "Ipo",
    "Likelihood",
    "LikelihoodAgainstUnlikelihood",
    "ListLikelihood",
    "LogRatio",
    "MarginAdaptive",
    "MaskNorm",
    "MaskedLogRatio",
    "NcaPair",
    "OddsRatio",
    "PairLoss",
    "PairSpec",
    "PairTerm",
    "PairWeight",
    "Pairs",
    "PreferenceLossOutput",
    "Robust",
    "SampledAlignment",
    "Score",
    "SearchConfidence",
    "Sequences",
    "Side",
    "Sigmoid",
    "SoftLabel",
    "SppoHard",
    "SquaredNash",
    "alpha_po",
    "aot",
    "apo",
    "bco",
    "cdpo",
    "cpo",
    "cream",
    "discopop",
    "dpo",
    "dpo_gamma",
    "ens_loss",
    "exo",
    "f_dpo",
    "from_first_difference",
    "hinge",
    "inpo",
    "ipo",
    "irpo",
    "kto_baseline",
    "ld_dpo",
    "linear_preference_loss",
    "madpo",
    "mapo_masks",
    "mcts_dpo",
    "mpo",
    "nca",
    "no_sft_ratio_w_unlikelihood",
    "orpo",
    "preference_loss",
    "preference_loss_from_logps",
    "rank_consistency",
    "rank_list",
    "robust_dpo",
    "rpo",
    "scir",
    "simpo",
    "sparse_po",
    "sppo",
    "tpo",
    "trl",
    "unlikelihood",
    "wpo",
]

if not TYPE_CHECKING:  # which would take any name for one
    __getattr__ = published_names("pair_loss")
