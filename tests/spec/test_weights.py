"""Token weights against independent transcriptions, token by token, and their corner
cases. Golden rows: ``golden.py``, the package's ``catalogue/golden.py``.
"""

import math

import pytest
import torch
from oracles import weights as oracle

import reweight_ops as rw
from reweight_ops.rules.likelihood import NLL

B, T, V, G = 6, 7, 11, 3


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(11)

    def normal(*size):
        return torch.randn(size, generator=g, dtype=torch.float64)

    logps = -normal(B, T).abs() - 0.05
    lengths = torch.tensor([7, 1, 4, 6, 2, 7])
    return {
        "logps": logps,
        "old": (logps + 0.4 * normal(B, T)).clamp(max=-1e-3),
        "ref": (logps + 0.4 * normal(B, T)).clamp(max=-1e-3),
        "adv": normal(B, T),
        "H": normal(B, T).abs() + 0.1,
        "mask": torch.arange(T) < lengths[:, None],
        "lengths": lengths.tolist(),
        "logits": 2 * normal(B, T, V),
    }


def weights_of(weight, data, **given):
    """``[B, T]``, as the op applies them; 0 where masked."""
    spec = rw.PolicyLossSpec(surrogate=NLL(), weights=(weight,), reduction=rw.NoReduction())
    stored = {
        "old_per_token_logps": data["old"],
        "ref_per_token_logps": data["ref"],
        "completion_mask": data["mask"],
        "unused": "ignore",
        **given,
    }
    out = rw.policy_loss_from_logps(
        data["logps"], data["adv"], spec=spec, entropies=data["H"], **stored
    )
    return out.loss / -data["logps"]


def tokens(data):
    where = data["mask"].nonzero().tolist()
    return [
        {
            name: data[key][i, t].item()
            for name, key in (("logp", "logps"), ("old", "old"), ("A", "adv"), ("H", "H"))
        }
        for i, t in where
    ]


def same(got, expected, mask):
    torch.testing.assert_close(
        got[mask], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("omega", ["code", "exact"])
@pytest.mark.parametrize("mapping", ["linear", "exponential"])
def test_steer(data, omega, mapping):
    expected = oracle.steer(tokens(data), omega, mapping)
    same(weights_of(rw.weights.steer(mapping, omega), data), expected, data["mask"])
    assert max(expected) - min(expected) > 0.1


def test_stored_entropies_replace_the_current_ones(data):
    stored = data["H"].flip(0)
    got = weights_of(rw.weights.steer("linear", entropies=stored), data)
    same(got, oracle.steer(tokens({**data, "H": stored}), mapping="linear"), data["mask"])
    assert (got - weights_of(rw.weights.steer("linear"), data)).abs().max() > 0.01


def test_hapo(data):
    rows = oracle.hapo(tokens(data))
    for k, weight in enumerate(
        (rw.weights.HapoLower(), rw.weights.HapoUpper(), rw.weights.HapoRedistribution())
    ):
        expected = [row[k] for row in rows]
        same(weights_of(weight, data), expected, data["mask"])
        assert len({round(x, 6) for x in expected}) > 2


def test_hapo_bounds_reach_the_clip(data):
    """The op with HAPO's bounds is the dual clip with those bounds given per token."""
    rows = torch.zeros(3, B, T, dtype=torch.float64)
    rows[:, data["mask"]] = torch.tensor(oracle.hapo(tokens(data)), dtype=torch.float64).T
    low, high, factor = rows
    r, A = (data["logps"] - data["old"]).exp(), data["adv"] * factor
    surrogate = torch.minimum(r * A, torch.minimum(torch.maximum(r, 1 - low), 1 + high) * A)
    expected = -torch.where(A < 0, torch.maximum(surrogate, 10 * A), surrogate)[data["mask"]].mean()
    out = rw.policy_loss_from_logps(
        data["logps"],
        data["adv"],
        spec="hapo",
        entropies=data["H"],
        old_per_token_logps=data["old"],
        completion_mask=data["mask"],
    )
    torch.testing.assert_close(out.loss, expected)
    assert (
        0 < out.is_clipped.sum() < data["mask"].sum() and out.metrics["clip_ratio/region_mean"] > 0
    )


@pytest.mark.parametrize("damp", [1.0, 0.9])
@pytest.mark.parametrize("fraction", [0.1, 0.3, 1.0])
def test_stare(data, fraction, damp):
    weight = rw.weights.SurprisalReweighting(fraction=fraction, damp=damp)
    same(weights_of(weight, data), oracle.stare(tokens(data), fraction, 1.1, damp), data["mask"])


def test_stare_counts_and_ties():
    """0.07 of 100 is 7 and not 8; of equal surprisals the first; one sign only; nothing
    valid.
    """
    logps, ones = (
        torch.full((1, 100), -1.0, dtype=torch.float64),
        torch.ones(1, 100, dtype=torch.float64),
    )
    weight = rw.weights.SurprisalReweighting(fraction=0.07, damp=0.9)
    data = {
        "logps": logps,
        "old": logps,
        "ref": logps,
        "adv": ones,
        "H": ones,
        "mask": torch.ones(1, 100, dtype=torch.bool),
    }
    assert 0.07 * 100 > 7
    assert weights_of(weight, data)[0].tolist() == pytest.approx([1.1] * 7 + [1.0] * 93)
    assert weights_of(weight, {**data, "adv": 0 * ones})[0].tolist() == [1.0] * 100
    assert (
        weights_of(weight, {**data, "mask": torch.zeros(1, 100, dtype=torch.bool)}).abs().sum() == 0
    )


def test_stare_controller():
    state = rw.weights.stare_state()
    state, weight = rw.weights.stare_update(state, torch.tensor(0.2))
    assert (
        weight.gate == 1
        and float(weight.amplify) == pytest.approx(1.1)
        and float(weight.damp) == pytest.approx(0.9)
    )
    state, weight = rw.weights.stare_update(state, torch.tensor(0.2), step=0.25)
    assert (float(state.amplify), float(state.damp)) == (pytest.approx(1.35), pytest.approx(0.65))
    state, _ = rw.weights.stare_update(state, torch.tensor(0.2), step=0.25)
    assert (float(state.amplify), float(state.damp)) == (1.5, 0.5)
    state, weight = rw.weights.stare_update(state, torch.tensor(0.5), step=0.25)
    assert weight.gate == 0 and (float(state.amplify), float(state.damp)) == (1.25, 0.75)
    for not_finite in (math.nan, math.inf):
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                rw.weights.stare_update(state, torch.tensor(not_finite), step=0.25)[0],
                state,
                strict=True,
            )
        )


def test_dual_level_down_sampling(data):
    sizes = (data["adv"].abs() * data["H"])[data["mask"]]
    expected = torch.zeros_like(sizes)
    expected[sizes.topk(math.ceil(0.25 * len(sizes))).indices] = 1
    same(
        weights_of(rw.weights.DualLevelDownSampling(fraction=0.25), data),
        expected.tolist(),
        data["mask"],
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("divergence", ["binary_kl", "tv"])
def test_divergence_gate_with_the_correction_is_openrlhfs(data, divergence, level):
    """The gate beside the plain ratio; thresholds that some units pass
    and some do not."""
    rows = [
        [{"old": data["old"][i, t].item(), "sampling": data["ref"][i, t].item()} for t in range(n)]
        for i, n in enumerate(data["lengths"])
    ]
    threshold = {"binary_kl": 0.03, "tv": 0.08}[divergence]
    expected = [
        x for row in rows for x in oracle.divergence_gate(row, divergence, level, threshold)
    ]
    assert 0 < sum(x == 0 for x in expected) < len(expected)
    gates = (
        rw.weights.TruncatedImportance(ratio_max=math.inf),
        rw.weights.divergence_gate(threshold, divergence, level),
    )
    spec = rw.PolicyLossSpec(surrogate=NLL(), weights=gates, reduction=rw.NoReduction())
    given = {
        "old_per_token_logps": data["old"],
        "sampling_per_token_logps": data["ref"],
        "completion_mask": data["mask"],
    }
    out = rw.policy_loss_from_logps(data["logps"], None, spec=spec, **given)
    same(out.loss / -data["logps"], expected, data["mask"])
    assert (spec.replace(reduction=rw.TokenMean()).one_pass_unsupported_reason is None) == (
        level == "token"
    )


def test_divergence_gate_refuses_what_it_does_not_know():
    for wrong in ({"divergence": "kl"}, {"level": "group"}):
        with pytest.raises(rw.InvalidCall, match="divergence_gate"):
            rw.weights.divergence_gate(0.1, **wrong)


# --- Advantage Reweighting: every mode against the authors' arithmetic on the advantage
def _reweighted(mode, A, p, alpha=0.3, k=5.0, tau=0.4, neg=0.7, mask=None):
    positive = A > 0
    sigmoid, linear = 2 * torch.sigmoid(k * (p - tau)), alpha * p + 1 - alpha
    if mode == "linear":
        return torch.where(positive, linear * A, neg * linear * A)
    if mode == "positive_linear":
        return torch.where(positive, linear * A, neg * A)
    if mode == "sigmoid":
        return torch.where(positive, sigmoid * A, neg * sigmoid * A)
    if mode == "negative_sigmoid":
        return torch.where(positive, A, sigmoid * A)
    if mode == "balanced_sigmoid":
        plus, minus = torch.where(positive, A, 0), torch.where(positive, 0, sigmoid * A)
        return plus + minus * ((plus * p)[mask].sum() / -(minus * p)[mask].sum()) * neg
    if mode == "interval":
        inside = ((p > 0.25) & (p <= 0.5)).double()
        return A * inside
    return positive.double() * (linear if mode == "raft_linear" else 1)


MODES = [
    "linear",
    "positive_linear",
    "sigmoid",
    "negative_sigmoid",
    "balanced_sigmoid",
    "interval",
    "raft",
    "raft_linear",
]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_advantage_reweighting_is_the_clip_of_reweighted_advantages(data, mode):
    options = {"mode": mode} | ({"interval": (0.25, 0.5)} if mode == "interval" else {})
    # whose ``neg_adv_weight`` the authors' code does not read
    if mode in ("negative_sigmoid", "interval", "raft", "raft_linear"):
        with pytest.raises(rw.InvalidCall, match="negative_weight has no effect"):
            rw.methods.advantage_reweighting(**options, negative_weight=0.7)
    else:
        options["negative_weight"] = 0.7
    spec = rw.methods.advantage_reweighting(**options)
    given = {"old_per_token_logps": data["old"], "completion_mask": data["mask"]}
    logps = data["logps"].requires_grad_()
    A = _reweighted(mode, data["adv"], data["old"].exp(), mask=data["mask"])
    losses = [
        rw.policy_loss_from_logps(logps, x, spec=s, **given).loss
        for x, s in ((data["adv"], spec), (A, "ppo"))
    ]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(x, logps)[0] for x in losses))
    assert spec.one_pass_unsupported_reason is None or mode == "balanced_sigmoid"


def test_advantage_reweighting_refuses_what_it_does_not_know():
    for wrong in (
        dict(mode="cubic"),
        dict(probabilities="both"),
        dict(mode="raft", probabilities="current"),
    ):
        with pytest.raises(rw.InvalidCall, match="advantage_reweighting"):
            rw.methods.advantage_reweighting(**wrong)


# --- functions of a whole group -------------------------------------------------------
@pytest.mark.parametrize("chunk", [1 << 24, 100, 1])
def test_tw_grpo(data, chunk):
    logits = data["logits"].clone()
    logits[0, 0, 0] = 40.0  # the clamp of ±11 is active
    logits[~data["mask"]] = math.nan  # padding is never read
    got = rw.weights.tw_grpo(
        logits, data["mask"], group_size=G, max_weight=1.7, chunk_elements=chunk
    )
    clean = torch.where(data["mask"][..., None], logits, 0).tolist()
    expected = oracle.tw_grpo(clean, data["lengths"], G, 1.7)
    torch.testing.assert_close(
        got, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12
    )
    assert got.max() > 1.5 and not got.requires_grad


def test_groups_may_be_ragged_and_shuffled(data):
    """``group_ids`` in any order give the rows of the consecutive groups; a prompt with
    one response has weight 1.
    """
    order = torch.tensor([3, 0, 4, 1, 5, 2])
    expected = rw.weights.tw_grpo(data["logits"], data["mask"], group_size=G)
    ids = (torch.arange(B) // G)[order]
    got = rw.weights.tw_grpo(
        data["logits"][order], data["mask"][order], group_ids=ids, num_groups=2
    )
    torch.testing.assert_close(got, expected[order])
    alone = rw.weights.tw_grpo(
        data["logits"], torch.ones(B, T), group_ids=torch.arange(B), num_groups=B
    )
    torch.testing.assert_close(alone, torch.ones_like(alone))
    correct = torch.tensor([True, False, True, False, True, True])
    whole = rw.weights.gtpo(data["H"], correct, data["mask"], group_size=G)
    part = rw.weights.gtpo(
        data["H"][order], correct[order], data["mask"][order], group_ids=ids, num_groups=2
    )
    torch.testing.assert_close(part, whole[order])


@pytest.mark.parametrize("correct", [[1, 0, 1, 0, 1, 1], [1] * 6, [0] * 6, [1, 0, 0, 0, 0, 0]])
def test_gtpo(data, correct):
    labels = [bool(x) for x in correct]
    rewards, advantages = oracle.gtpo(data["H"].tolist(), labels, data["lengths"], G)
    for normalize, expected in ((False, rewards), (True, advantages)):
        got = rw.weights.gtpo(
            data["H"], torch.tensor(labels), data["mask"], group_size=G, normalize=normalize
        )
        torch.testing.assert_close(
            got, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12
        )


def test_gtpo_conserves_reward(data):
    """Proposition 2.2: with α₁ + α₂ = 1 the rewards at a position sum to the number of
    correct minus that of wrong responses there.
    """
    correct = torch.tensor([True, True, False, True, False, False])
    got = rw.weights.gtpo(
        data["H"], correct, data["mask"], alpha_1=0.9, alpha_2=0.1, normalize=False, group_size=B
    )
    expected = torch.where(correct[:, None], 1.0, -1.0) * data["mask"]
    torch.testing.assert_close(got.sum(0), expected.sum(0).double(), rtol=1e-6, atol=1e-6)


def test_groups_fail_loudly(data):
    for wrong in (
        dict(),
        dict(group_size=4),
        dict(group_ids=torch.zeros(B)),
        dict(group_size=3, group_ids=torch.zeros(B), num_groups=1),
        dict(group_ids=torch.zeros(2), num_groups=1),
    ):
        with pytest.raises(rw.InvalidCall, match="tw_grpo"):
            rw.weights.tw_grpo(data["logits"], data["mask"], **wrong)
        with pytest.raises(rw.InvalidCall, match="gtpo"):
            rw.weights.gtpo(data["H"], torch.ones(B), data["mask"], **wrong)
    with pytest.raises(rw.InvalidCall, match="completion_mask has shape"):
        rw.weights.tw_grpo(data["logits"], data["mask"][:, 1:], group_size=G)
    with pytest.raises(rw.InvalidCall, match="expected \\[B, T, V\\]"):
        rw.weights.tw_grpo(data["logits"][0], data["mask"], group_size=G)


# --- reductions over a weight ---------------------------------------------------------
def test_a_mean_over_stored_probabilities_takes_one_pass_and_counts_what_it_keeps(data):
    """SPO: numerator and denominator, in one pass; on-policy the old probabilities are
    the current ones, and it takes two.
    """
    spec = rw.methods.ppo().replace(
        reduction=rw.TokenMean(weight=rw.weights.spo_probability_mask(0.6))
    )
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))
    logits = data["logits"].float().requires_grad_()
    given = dict(
        completion_mask=data["mask"], old_per_token_logps=data["old"].float(), backend="reference"
    )
    results = {}
    for plan in ("one_pass", "two_pass"):
        out = rw.policy_loss(logits, ids, data["adv"].float(), spec=spec, plan=plan, **given)
        results[plan] = out.loss, torch.autograd.grad(out.loss, logits)[0]
    torch.testing.assert_close(results["one_pass"], results["two_pass"])
    kept = data["mask"] & (data["old"].float().exp() < 0.6)
    by_hand = rw.policy_loss(
        logits, ids, data["adv"].float(), spec="ppo", **{**given, "completion_mask": kept}
    ).loss
    torch.testing.assert_close(results["one_pass"][0], by_hand)
    assert 0 < kept.sum() < data["mask"].sum()
    on_policy = {**given, "old_per_token_logps": None}
    assert (
        rw.policy_loss(logits, ids, data["adv"].float(), spec=spec, **on_policy).plan == "two_pass"
    )


def test_training_signal_annealing_mean(data):
    weight = rw.weights.TrainingSignalAnnealing(threshold=0.4)
    spec = rw.methods.sft().replace(reduction=rw.TokenMean(weight=weight))
    out = rw.policy_loss_from_logps(data["logps"], None, spec=spec, completion_mask=data["mask"])
    kept = data["logps"][data["mask"] & (data["logps"].exp() <= 0.4)]
    torch.testing.assert_close(out.loss, -kept.mean())


def test_raft_is_the_mean_of_the_rewarded(data):
    spec = rw.PolicyLossSpec(
        surrogate=rw.rules.RULES["reinforce"](),
        weights=(rw.weights.RewardRanked(),),
        reduction=rw.TokenSum(),
    )
    out = rw.policy_loss_from_logps(
        data["logps"], data["adv"], spec=spec, completion_mask=data["mask"]
    )
    torch.testing.assert_close(out.loss, -data["logps"][data["mask"] & (data["adv"] > 0)].sum())


def test_weight_builders_fail_loudly():
    for build in (
        lambda: rw.weights.steer(omega="x"),
        lambda: rw.weights.steer(mapping="x"),
        lambda: rw.weights.steer(w_min=0.0),
        lambda: rw.weights.f_distill("hellinger"),
        lambda: rw.weights.confidence_mask(torch.zeros(2), 1.5),
    ):
        with pytest.raises(rw.InvalidCall):
            build()
    with pytest.raises(TypeError, match="fraction"):
        rw.weights.DualLevelDownSampling()


@pytest.mark.parametrize(
    "name",
    [
        "TruncatedImportance",
        "MaskedImportance",
        "SequenceTruncatedImportance",
        "SequenceMaskedImportance",
    ],
)
def test_an_unknown_sampler_log_prob_is_a_ratio_of_one(name):
    """As in TRL 1.16: the token stays, and its sequence's ratio is that
    of the others."""
    spec = rw.methods.grpo().with_weight(getattr(rw.weights, name)(ratio_max=1.5))
    logps, old, sampling = (
        torch.full((2, 3), -1.0),
        torch.full((2, 3), -1.0),
        torch.full((2, 3), -1.0),
    )
    sampling[0, 1] = math.nan
    options = {"spec": spec, "old_per_token_logps": old}
    losses = [
        rw.policy_loss_from_logps(
            logps.clone().requires_grad_(), torch.ones(2), sampling_per_token_logps=s, **options
        ).loss
        for s in (sampling, sampling.nan_to_num(-1.0))
    ]
    assert torch.equal(losses[0], losses[1]) and losses[0].isfinite()
