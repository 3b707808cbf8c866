"""Specs, user rules, user weights, batch statistics and metrics (docs/api.md)."""

import dataclasses
import math

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.formula.base import RULES, WEIGHTS, Rule, TokenWeight
from reweight_ops.testing import compare, gradcheck, make_batch


def define():
    @rw.rule("quadratic_clip")
    class QuadraticClip(rw.Rule):
        """A user's own surrogate."""

        width: float = 0.3

        def loss(self, xp, t):
            x = xp.clip(xp.exp(t.log_ratio) - 1, -self.width, self.width)
            return -(x - 0.5 * x * x) * t.adv

    @rw.weight
    class GatedRarity(rw.TokenWeight):
        a: float = 5.0

        def weight(self, xp, t, batch):
            return xp.sigmoid(self.a * (t.entropy - batch.mean(t.entropy))) * (1 - xp.exp(t.logp))

    @rw.weight
    class Rarity(rw.TokenWeight):
        floor: float = 0.1

        def weight(self, xp, t, batch):
            return xp.maximum(1 - xp.exp(t.logp), self.floor)

    return QuadraticClip, GatedRarity, Rarity


@pytest.mark.usefixtures("registry")
def test_a_users_rule_and_weight_work_with_every_path():
    quadratic, gated, rarity = define()
    spec = rw.PolicyLossSpec(surrogate=quadratic(width=0.4), weights=(rarity(floor=0.2),))
    assert (
        spec.requires == {"log_ratio", "adv", "logp"} and spec.one_pass_unsupported_reason is None
    )
    batch = make_batch(spec, (3, 8), 29, dtype=torch.float64)
    assert gradcheck(spec, batch)
    z, grads = batch["logits"].detach().requires_grad_(), {}
    for plan in ("one_pass", "two_pass"):
        out = rw.policy_loss(**{**batch, "logits": z}, spec=spec, plan=plan, backend="reference")
        (grads[plan],) = torch.autograd.grad(out.loss, z)
    torch.testing.assert_close(grads["one_pass"], grads["two_pass"], rtol=1e-12, atol=1e-14)
    by_hand = torch.log_softmax(z, -1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    x = ((by_hand - batch["old_per_token_logps"]).exp() - 1).clamp(-0.4, 0.4)
    terms = -(x - 0.5 * x * x) * batch["advantages"] * (1 - by_hand.detach().exp()).clamp(min=0.2)
    mask = batch["completion_mask"]
    torch.testing.assert_close(
        grads["two_pass"], torch.autograd.grad((terms * mask).sum() / mask.sum(), z)[0]
    )
    # On the default backend of this machine, whatever plan it has for a rule that is
    # not compiled in.
    assert compare(spec, make_batch(spec)).passed
    batch_spec = spec.replace(weights=(gated(a=3.0),))
    assert (
        "batch statistics" in batch_spec.one_pass_unsupported_reason
        and gradcheck(batch_spec, batch)
        and compare(batch_spec, make_batch(batch_spec)).passed
    )


@pytest.mark.usefixtures("registry")
def test_definitions_are_frozen_keyword_only_and_registered():
    quadratic, _, rarity = define()
    assert RULES["quadratic_clip"] is quadratic and WEIGHTS["rarity"] is rarity
    with pytest.raises(TypeError):
        quadratic(0.3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        quadratic().width = 1
    again, _, _ = define()  # a notebook cell run twice
    assert RULES["quadratic_clip"] is again
    foreign = type("Clip", (Rule,), {"__module__": "elsewhere", "__annotations__": {}})
    with pytest.raises(
        rw.InvalidCall, match="'clip' is taken by reweight_ops.rules.surrogates.Clip"
    ):
        rw.rule("clip")(foreign)
    with pytest.raises(rw.InvalidCall, match="must derive from TokenWeight"):
        rw.weight(type("NoWeight", (), {}))
    with pytest.raises(rw.InvalidCall, match="lower_snake_case"):
        rw.rule("My Rule")(type("X", (Rule,), {}))
    with pytest.raises(rw.InvalidCall, match="kind is 'loss'"):
        rw.rule("x", kind="loss")


@pytest.mark.usefixtures("registry")
def test_python_control_flow_in_a_formula_is_an_error():
    @rw.rule("branchy")
    class Branchy(rw.Rule):
        def loss(self, xp, t):
            return -t.logp if t.adv > 0 else t.logp

    with pytest.raises(TypeError, match=r"use xp\.where"):
        rw.PolicyLossSpec(surrogate=Branchy())

    @rw.rule("mathy")
    class Mathy(rw.Rule):
        def loss(self, xp, t):
            return math.exp(t.logp) + torch.exp(t.logp)

    with pytest.raises(TypeError, match=r"xp\."):
        rw.PolicyLossSpec(surrogate=Mathy())


def test_requires_is_traced():
    assert rw.methods.reinforce().requires == {"adv", "logp"}
    assert rw.methods.grpo(beta=0.1).requires == {"adv", "log_ratio", "ref_logp", "logp"}
    assert rw.methods.advantage_reweighting().requires == {"adv", "log_ratio", "old_logp"}
    assert (
        "entropy" in rw.methods.top_entropy().requires
        and "entropy" in rw.methods.trl(entropy_coef=0.1, top_entropy_quantile=0.5).requires
    )
    assert (
        "sampling_logp"
        in rw.methods.grpo().with_weight(rw.weights.SequenceMaskedImportance()).requires
    )


def test_specs_are_values():
    spec = rw.methods.grpo(beta=0.04)
    assert (
        spec == rw.method("grpo", beta=0.04)
        and hash(spec) == hash(rw.methods.grpo(beta=0.04))
        and spec != rw.methods.grpo()
    )
    changed = spec.replace(
        **{
            "surrogate.epsilon_high": 0.28,
            "penalties.0.coef": 0.1,
            "ratio.clamp": 10.0,
            "name": "mine",
        }
    )
    assert (
        changed.surrogate.epsilon_high,
        changed.penalties[0].coef,
        changed.ratio.clamp,
        changed.name,
    ) == (0.28, 0.1, 10.0, "mine")
    assert spec.surrogate.epsilon_high == 0.2 and spec.with_weight(
        rw.weights.TopEntropy()
    ).weights == (rw.weights.TopEntropy(),)
    assert len(spec.with_penalty(rw.Penalty(rw.rules.penalties.K2(), 0.1)).penalties) == 2
    with pytest.raises(TypeError):
        rw.PolicyLossSpec(rw.rules.surrogates.Clip())


def test_many_terms_take_one_pass():
    spec = rw.methods.grpo()
    for _ in range(8):
        spec = spec.with_penalty(rw.Penalty(rw.rules.penalties.K2(), 0.1))
    assert spec.one_pass_unsupported_reason is None and len(spec.program.terms) == 9


def test_dapo_of_the_paper_and_of_trl():
    assert (
        rw.methods.dapo().surrogate.epsilon_high == 0.28
        and rw.methods.trl("dapo").surrogate.epsilon_high == 0.2
    )
    assert rw.methods.trl("cispo", epsilon_high=5.0).surrogate.ratio_max == 5.0
    assert rw.methods.verl("cispo", clip_ratio_high=0.28).surrogate.ratio_max == 1.28


@pytest.mark.usefixtures("registry")
def test_batch_statistics():
    found = {}

    @rw.weight
    class Probe(TokenWeight):
        def weight(self, xp, t, batch):
            for name in ("mean", "sum", "min", "max", "seq_mean", "seq_sum"):
                found[name] = getattr(batch, name)(t.adv)
            found["quantile"] = batch.quantile(t.adv, 0.3)
            return found["mean"] + 0 * t.logp

    spec = rw.methods.grpo().with_weight(Probe())
    batch = make_batch(spec, (4, 9), 11)
    rw.policy_loss(**batch, spec=spec, backend="reference")
    adv, mask = batch["advantages"], batch["completion_mask"]
    valid = adv[mask]
    for name, want in (
        ("mean", valid.mean()),
        ("sum", valid.sum()),
        ("min", valid.min()),
        ("max", valid.max()),
        ("quantile", valid.quantile(0.3)),
    ):
        torch.testing.assert_close(found[name], want)
    totals = (adv * mask).sum(-1, keepdim=True)
    torch.testing.assert_close(found["seq_sum"].view(4, 9), totals.expand(4, 9))
    torch.testing.assert_close(
        found["seq_mean"].view(4, 9), (totals / mask.sum(-1, keepdim=True)).expand(4, 9)
    )


def test_weight_scopes():
    """scope="all" reaches the penalties, "surrogate" does not."""
    spec = rw.methods.dapo(entropy_coef=1.0)
    batch = make_batch(spec, (3, 8), 29)
    batch["advantages"] = batch["advantages"] * 0
    nothing = rw.weights.ProbabilityBand(lower=2.0)  # selects no token
    out = {
        scope: rw.policy_loss(
            **batch, spec=spec.with_weight(dataclasses.replace(nothing, scope=scope))
        ).loss
        for scope in ("surrogate", "all")
    }
    assert out["all"] == 0 and out["surrogate"] < -0.1


# --- metrics --------------------------------------------------------------------------
def test_metrics_exist_only_where_they_apply():
    grpo = make_batch(rw.methods.grpo(beta=0.1), (3, 8), 29)
    names = set(rw.policy_loss(**grpo, spec=rw.methods.grpo(beta=0.1)).metrics)
    assert {
        "entropy",
        "kl",
        "clip_ratio/low_mean",
        "clip_ratio/high_max",
        "ratio/mean",
        "ratio/max",
        "tokens",
        "sequences",
        "rows_skipped",
    } <= names
    grpo.pop("ref_per_token_logps")
    reinforce = rw.policy_loss(**grpo, spec="reinforce", unused="ignore").metrics
    assert not {"kl", "clip_ratio/low_mean", "ratio/mean", "weight/mean"} & set(reinforce)
    assert (
        "weight/mean"
        in rw.policy_loss(**grpo, spec="reinforce", token_weights=0.5, unused="ignore").metrics
    )
    with pytest.raises(KeyError, match="this call has"):
        reinforce["kl"]


def test_metrics_combine_like_one_batch():
    spec = rw.methods.dapo()
    whole = make_batch(spec, (6, 8), 29)
    parts = [{k: v[i : i + 2] for k, v in whole.items()} for i in (0, 2, 4)]
    combined = rw.Metrics.combine(
        [rw.policy_loss(**part, spec=spec, num_items_in_batch=9.0).metrics for part in parts]
    )
    want = rw.policy_loss(**whole, spec=spec, num_items_in_batch=9.0).metrics
    assert combined.as_floats() == pytest.approx(want.as_floats(), rel=1e-5)
    assert want["ratio/max"] > want["ratio/mean"] and combined.sums.shape == (len(want), 2)
    with pytest.raises(rw.InvalidCall, match="one spec"):
        rw.Metrics.combine(
            [want, rw.policy_loss(**whole, spec="reinforce", unused="ignore").metrics]
        )


def test_metrics_names_and_prefix():
    spec = rw.methods.dapo()
    m = rw.policy_loss(**make_batch(spec, (3, 8), 29), spec=spec).metrics
    assert m.as_floats("trl", "train/")["train/entropy"] == pytest.approx(float(m["entropy"]))
    verl = m.as_floats("verl")
    assert {"actor/pg_clipfrac", "actor/ppo_kl", "actor/entropy"} <= set(verl)
    assert all(name.startswith("actor/") and name.count("actor/") == 1 for name in verl) and len(
        verl
    ) == len(m)
    assert m.as_floats("verl", "actor/") == verl
    assert m.as_floats("verl", "") == {
        name.removeprefix("actor/"): value for name, value in verl.items()
    }
    with pytest.raises(rw.InvalidCall, match="'trl' or 'verl'"):
        m.as_floats("liger")


def test_metrics_over_ranks(tmp_path):
    """Two gloo ranks with half the batch each report the whole batch's metrics."""
    import torch.multiprocessing as mp

    mp.spawn(_rank, (str(tmp_path / "store"),), nprocs=2)


def _rank(rank, store):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    spec = rw.methods.dapo()
    whole = make_batch(spec, (4, 8), 29)
    part = {k: v[2 * rank : 2 * rank + 2] for k, v in whole.items()}
    got = rw.policy_loss(**part, spec=spec).metrics.all_reduce()
    want = rw.policy_loss(**whole, spec=spec).metrics
    assert got.as_floats() == pytest.approx(want.as_floats(), rel=1e-5)
    dist.destroy_process_group()
