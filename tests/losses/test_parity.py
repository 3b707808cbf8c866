"""The whole op against independent transcriptions of TRL, verl and the papers: loss,
gradient by the logits, metrics, in fp64.
"""

import itertools

import pytest
import torch
from oracles import papers, trl, verl

import reweight_ops as rw


@pytest.fixture(scope="module")
def batch():
    g = torch.Generator().manual_seed(5)
    B, T, V = 6, 9, 7
    logits = (2 * torch.randn(B, T, V, generator=g, dtype=torch.float64)).requires_grad_()
    ids = torch.randint(V, (B, T), generator=g)
    mask = torch.arange(T) < torch.tensor([9, 1, 4, 7, 2, 9])[:, None]
    logp = trl.logps_and_entropies(logits.detach(), ids)[0]
    old, ref = (logp + s * torch.randn(B, T, generator=g, dtype=torch.float64) for s in (0.4, 0.3))
    adv = {
        "sequence": torch.randn(B, generator=g, dtype=torch.float64),
        "token": torch.randn(B, T, generator=g, dtype=torch.float64),
    }
    ratios = {
        "token": torch.rand(B, T, generator=g, dtype=torch.float64),
        "sequence": torch.rand(B, 1, generator=g, dtype=torch.float64),
    }
    return dict(logits=logits, ids=ids, mask=mask, old=old, ref=ref, adv=adv, ratios=ratios)


def statistics(batch, temperature=1.0):
    return trl.logps_and_entropies(batch["logits"], batch["ids"], temperature)


def ours(batch, spec, adv, **options):
    names = {"old": "old_per_token_logps", "ref": "ref_per_token_logps"}
    data = {name: batch[key] for key, name in names.items()} | {
        "completion_mask": batch["mask"],
        "unused": "ignore",
    }
    return rw.policy_loss(
        batch["logits"], batch["ids"], adv, spec=spec, backend="reference", **{**data, **options}
    )


def same(ours, theirs, logits):
    (a,), (b,) = (torch.autograd.grad(loss, logits, retain_graph=True) for loss in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    assert b.abs().sum() > 1e-3


TRL_EXTRAS = {
    "plain": {},
    "kl": dict(beta=0.04),
    "kl_uncorrected": dict(beta=0.04, use_bias_correction_kl=False),
    "delta": dict(delta=1.3, epsilon_high=0.28),
    "bonus": dict(entropy_coef=0.02),
    "top": dict(top_entropy_quantile=0.4),
    "opsm": dict(off_policy_mask_threshold=-0.1),
    "all": dict(
        beta=0.04, delta=1.3, entropy_coef=0.02, top_entropy_quantile=0.4, epsilon_high=0.28
    ),
}


@pytest.mark.parametrize("extras", TRL_EXTRAS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
)
def test_trl(batch, loss_type, level, extras):
    settings = {
        **TRL_EXTRAS[extras],
        "importance_sampling_level": level,
        "max_completion_length": 16,
    }
    if loss_type == "cispo":
        settings["epsilon_high"] = 1.15
    if loss_type in ("cispo", "sapo", "vespo"):
        settings.pop("delta", None)
    if loss_type == "vespo" and level == "sequence":
        with pytest.raises(rw.InvalidCall, match="must be 'token'"):
            rw.methods.trl(loss_type, unused="ignore", **settings)
        return
    temperature = 0.9
    logp, entropy = statistics(batch, temperature)
    # vespo has the correction in its weight: below
    ratios = (None,) if loss_type == "vespo" else (None, *batch["ratios"].values())
    for adv, ratio in itertools.product(batch["adv"].values(), ratios):
        theirs, logged = trl.grpo_loss(
            logp,
            adv,
            batch["mask"],
            entropies=entropy,
            old_logps=batch["old"],
            ref_logps=batch["ref"],
            loss_type=loss_type,
            num_items_in_batch=41.0,
            importance_sampling_ratio=ratio,
            **settings,
        )
        divisor = {"num_items_in_batch": 41.0} if loss_type in ("dapo", "cispo", "vespo") else {}
        out = ours(
            batch,
            rw.methods.trl(loss_type, unused="ignore", **settings),
            adv,
            temperature=temperature,
            importance_sampling_ratio=ratio,
            **divisor,
        )
        same(out.loss, theirs, batch["logits"])
        metrics = out.metrics.as_floats("trl")
        assert {name: pytest.approx(value, rel=1e-9) for name, value in logged.items()} == {
            name: metrics[name] for name in logged
        }


@pytest.mark.parametrize(
    "bounds", [{}, {"clip_min": 0.8, "clip_max": 1.2}, {"clip_min": 0.9, "clip_max": None}], ids=str
)
@pytest.mark.parametrize(
    "mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
)
@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
def test_trl_correction_for_vllm(batch, loss_type, mode, bounds):
    """The correction uses the sampler's log-probs. The KL's bias correction still uses
    the ratio to the old policy.
    """
    options = {
        f"vllm_importance_sampling_{name}": value
        for name, value in {"mode": mode, **bounds}.items()
    }
    if loss_type == "vespo" and mode.startswith("sequence"):
        with pytest.raises(rw.InvalidCall, match="needs a token mode"):
            rw.methods.trl(loss_type, **options)
        return
    sampling = batch["old"] + 0.2 * torch.randn(
        batch["old"].shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64
    )
    sampling[0, 3] = float("nan")
    logp, _ = statistics(batch)
    ratio = trl.sampling_ratio(batch["old"], sampling, batch["mask"], mode, **bounds)
    theirs, _ = trl.grpo_loss(
        logp,
        batch["adv"]["sequence"],
        batch["mask"],
        old_logps=batch["old"],
        ref_logps=batch["ref"],
        loss_type=loss_type,
        num_items_in_batch=41.0,
        importance_sampling_ratio=ratio,
        beta=0.5,
    )
    spec = rw.methods.trl(loss_type, beta=0.5, **options)
    out = ours(
        batch,
        spec,
        batch["adv"]["sequence"],
        num_items_in_batch=41.0,
        sampling_per_token_logps=sampling,
    )
    same(out.loss, theirs, batch["logits"])


#: Options of each mode that make it act on this batch.
VERL_OWN = {
    "clip_cov": dict(clip_cov_ratio=0.2, clip_cov_lb=1.8),
    "kl_cov": dict(kl_cov_ratio=0.2, ppo_kl_coef=0.3),
    "dro": dict(dro_beta=0.5),
    "dppo_tv": dict(clip_ratio_low=0.04, clip_ratio_high=0.06),
    "dppo_kl": dict(clip_ratio_low=0.001, clip_ratio_high=0.002),
}


VERL_AROUND = {
    "plain": {},
    "kl": dict(kl_loss_coef=0.05),
    "kl_entropy": dict(kl_loss_coef=0.05, entropy_coeff=0.02),
}


@pytest.mark.parametrize("around", VERL_AROUND)
@pytest.mark.parametrize(
    "mode",
    [
        "token-mean",
        "token-sum",
        "seq-mean-token-sum",
        "seq-mean-token-sum-norm",
        "seq-mean-token-mean",
    ],
)
@pytest.mark.parametrize("loss_mode", [m for m in verl.LOSSES if m != "bypass_mode"])
def test_verl(batch, loss_mode, mode, around):
    logp, entropy = statistics(batch)
    mask = batch["mask"].clone()
    mask[3] = False  # verl leaves empty sequences out of its sequence means
    bounds = dict(clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=1.5)
    own = dict(loss_agg_mode=mode, **VERL_AROUND[around], **(bounds | VERL_OWN.get(loss_mode, {})))
    weights, adv = batch["ratios"]["token"], batch["adv"]["token"]
    if loss_mode == "geo_mean":  # per sequence: the same for every token
        adv = batch["adv"]["sequence"][:, None].expand_as(adv)
    theirs, _ = verl.policy_loss(
        loss_mode,
        logp,
        adv,
        mask,
        old_logps=batch["old"],
        ref_logps=batch["ref"],
        entropies=entropy,
        rollout_is_weights=weights,
        **own,
    )
    spec = rw.methods.verl(loss_mode, use_kl_loss="kl" in around, unused="ignore", **own)
    # verl takes the weights' geometric mean and adds 1e-10 to each
    if loss_mode == "geo_mean":
        adv = batch["adv"]["sequence"]
        weights = (
            ((weights + 1e-10).log() * mask)
            .sum(-1, keepdim=True)
            .div(mask.sum(-1, keepdim=True).clamp(min=1))
            .exp()
        )
    out = ours(batch, spec, adv, completion_mask=mask, importance_sampling_ratio=weights)
    # verl divides a sequence's sum by its length + 1e-8
    torch.testing.assert_close(out.loss, theirs, rtol=1e-7, atol=1e-9)
    (a,), (b,) = (
        torch.autograd.grad(loss, batch["logits"], retain_graph=True) for loss in (out.loss, theirs)
    )
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert b.abs().sum() > 1e-3


def test_the_batch_meets_the_rare_branches_of_verl(batch):
    """Tokens are dropped, drawn and clipped; otherwise the comparison above would prove
    little.
    """
    for mode in ("dppo_tv", "dppo_kl", "clip_cov", "geo_mean"):
        spec = rw.methods.verl(mode, unused="ignore", **VERL_OWN.get(mode, {}))
        changed = rw.methods.verl(mode, unused="ignore", clip_ratio=10.0, clip_cov_lb=4.9)
        adv = batch["adv"]["sequence" if mode == "geo_mean" else "token"]
        one, other = (ours(batch, s, adv).loss for s in (spec, changed))
        assert (one - other).abs() > 1e-4, mode


BYPASS = [
    {"rollout_loss_type": "ppo_clip"},
    {"rollout_loss_type": "reinforce"},
    *(
        {"rollout_loss_type": "reinforce", "rollout_is": level, "rollout_is_threshold": t}
        for level in ("token", "sequence")
        for t in (1.1, (0.8, 1.3))
    ),
]


@pytest.mark.parametrize("options", BYPASS, ids=[" ".join(map(str, b.values())) for b in BYPASS])
def test_verl_bypass_mode(batch, options):
    """The old log-probs are the sampler's: directly for REINFORCE with weights, and as
    the old policy's for the clip.
    """
    logp, _ = statistics(batch)
    theirs, _ = verl.policy_loss(
        "bypass_mode",
        logp,
        batch["adv"]["token"],
        batch["mask"],
        old_logps=batch["old"],
        clip_ratio_c=1.5,
        **options,
    )
    clip = options["rollout_loss_type"] == "ppo_clip"
    spec = rw.methods.verl(
        "bypass_mode", **options, **({"clip_ratio_c": 1.5} if clip else {}), unused="ignore"
    )
    data = {"old_per_token_logps" if clip else "sampling_per_token_logps": batch["old"]}
    out = ours(batch, spec, batch["adv"]["token"], **{"old_per_token_logps": None, **data})
    same(out.loss, theirs, batch["logits"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("dro",), "no default for dro_beta"),
        (("vanilla", {"dro_beta": 0.1}), "dro_beta has no effect with loss_mode='vanilla'"),
        (("kl_cov", {"clip_ratio": 0.3}), "clip_ratio has no effect"),
        (("bypass_mode", {"rollout_loss_type": "ppo"}), "expected 'ppo_clip' or 'reinforce'"),
        (
            ("bypass_mode", {"rollout_is": "token"}),
            "rollout_is has no effect with rollout_loss_type='ppo_clip'",
        ),
        (
            ("bypass_mode", {"rollout_loss_type": "reinforce", "rollout_is": "group"}),
            "expected None, 'token' or 'sequence'",
        ),
    ],
)
def test_verl_refuses_what_would_have_no_effect(options, message):
    mode, *rest = options
    with pytest.raises(rw.InvalidCall, match=message):
        rw.methods.verl(mode, **dict(*rest))


@pytest.mark.parametrize("kind", ["k1", "abs", "k2", "k3", "k1+", "abs+", "k3+", "low_var_kl"])
def test_verl_kl_types(batch, kind):
    logp, _ = statistics(batch)
    theirs, _ = verl.policy_loss(
        "gpg",
        logp,
        batch["adv"]["token"],
        batch["mask"],
        ref_logps=batch["ref"],
        kl_loss_coef=0.5,
        kl_loss_type=kind,
    )
    spec = rw.methods.verl("gpg", use_kl_loss=True, kl_loss_coef=0.5, kl_loss_type=kind)
    same(ours(batch, spec, batch["adv"]["token"]).loss, theirs, batch["logits"])


def test_verl_global_divisors(batch):
    logp, _ = statistics(batch)
    for mode, info, divisor in (
        ("token-mean", dict(dp_size=2, batch_num_tokens=90), dict(num_items_in_batch=45)),
        (
            "seq-mean-token-mean",
            dict(dp_size=2, global_batch_size=12),
            dict(num_sequences_in_batch=6),
        ),
        ("token-sum", dict(dp_size=2), dict(loss_scale=2.0)),
    ):
        theirs, _ = verl.policy_loss(
            "vanilla",
            logp,
            batch["adv"]["token"],
            batch["mask"],
            old_logps=batch["old"],
            loss_agg_mode=mode,
            global_batch_info=info,
        )
        out = ours(
            batch, rw.methods.verl("vanilla", loss_agg_mode=mode), batch["adv"]["token"], **divisor
        )
        torch.testing.assert_close(out.loss, theirs, rtol=1e-7, atol=1e-9)


PAPERS = {
    "ppo": lambda p, b: papers.ppo_clip(p, b["old"], b["adv"]["token"], b["mask"]),
    "dapo": lambda p, b: papers.dapo(p, b["old"], b["adv"]["token"], b["mask"]),
    "gspo": lambda p, b: papers.gspo(p, b["old"], b["adv"]["sequence"], b["mask"], 0.1, 0.2),
    "gspo_token": lambda p, b: papers.gspo_token(
        p, b["old"], b["adv"]["token"], b["mask"], 0.1, 0.2
    ),
    "sapo": lambda p, b: papers.sapo(p, b["old"], b["adv"]["token"], b["mask"]),
    "gpg": lambda p, b: papers.gpg(p, b["adv"]["token"], b["mask"]),
    "cispo": lambda p, b: papers.cispo(p, b["old"], b["adv"]["token"], b["mask"], 1.0, 0.3),
    "dr_grpo": lambda p, b: papers.dr_grpo(p, b["old"], b["adv"]["token"], b["mask"], horizon=50),
}
OPTIONS = {
    "gspo": dict(epsilon_low=0.1, epsilon_high=0.2),
    "gspo_token": dict(epsilon_low=0.1, epsilon_high=0.2),
    "cispo": dict(ratio_max=1.3),
    "dr_grpo": dict(horizon=50),
}


@pytest.mark.parametrize("name", PAPERS)
def test_papers(batch, name):
    theirs = PAPERS[name](statistics(batch)[0], batch)
    adv = batch["adv"]["sequence" if name == "gspo" else "token"]
    same(ours(batch, rw.method(name, **OPTIONS.get(name, {})), adv).loss, theirs, batch["logits"])


def test_paper_grpo_with_kl(batch):
    theirs = papers.grpo(
        statistics(batch)[0], batch["old"], batch["ref"], batch["adv"]["token"], batch["mask"]
    )
    same(
        ours(batch, rw.methods.grpo(beta=0.04), batch["adv"]["token"]).loss, theirs, batch["logits"]
    )


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_advantage_reweighting(batch, plan):
    logp, _ = statistics(batch)
    theirs = papers.advantage_reweighting(
        lambda A: papers.ppo_clip(logp, batch["old"], A, batch["mask"]),
        batch["adv"]["token"],
        batch["old"],
        0.4,
    )
    same(
        ours(
            batch, rw.methods.advantage_reweighting(alpha=0.4), batch["adv"]["token"], plan=plan
        ).loss,
        theirs,
        batch["logits"],
    )


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_lopti(batch, plan):
    logp, entropy = statistics(batch)
    A, old = batch["adv"]["token"], batch["old"]
    ratio = (logp - old).exp()
    terms = (
        -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)
        + 0.04 * papers.k3(logp, batch["ref"])
        - 0.01 * entropy
    )
    for half, theirs in zip(
        ("low", "high"), papers.lopti(terms, old, batch["mask"], eta=0.1), strict=True
    ):
        spec = rw.methods.lopti(half, eta=0.1, beta=0.04, entropy_coef=0.01)
        same(ours(batch, spec, A, plan=plan).loss, theirs, batch["logits"])


def test_lopti_by_quantile_with_ar_and_dual_clip(batch):
    """The authors' other split, on their scripts' settings: reweighted advantages and a
    dual clip.
    """
    logp, _ = statistics(batch)
    old, ratio = batch["old"], (logp - batch["old"]).exp()
    A = (0.3 * old.exp() + 0.7) * batch["adv"]["token"]
    clipped = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.24) * A)
    terms = torch.where(A < 0, torch.minimum(clipped, -1.4 * A), clipped) + 0.04 * papers.k3(
        logp, batch["ref"]
    )
    assert (terms != clipped + 0.04 * papers.k3(logp, batch["ref"])).any()
    for half, theirs in zip(
        ("low", "high"), papers.lopti_by_portion(terms, old, batch["mask"], 0.4), strict=True
    ):
        spec = rw.methods.lopti(
            half,
            eta=0.4,
            split="quantile",
            alpha=0.3,
            epsilon_high=0.24,
            clip_ratio_c=1.4,
            beta=0.04,
        )
        same(ours(batch, spec, batch["adv"]["token"]).loss, theirs, batch["logits"])
