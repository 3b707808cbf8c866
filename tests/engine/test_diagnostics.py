"""Diagnostics against loops over Python numbers, and under verl's and TRL's names."""

import math

import pytest
import torch
from torch.utils import _pytree

import reweight_ops as rw
from reweight_ops import preference

B, T, V = 4, 6, 9


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(6)
    logits = (2 * torch.randn(B, T, V, generator=g)).double().requires_grad_()
    ids = torch.randint(V, (B, T), generator=g)
    logps = logits.detach().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old, sampling = (
        logps + s * torch.randn(B, T, generator=g, dtype=torch.float64) for s in (0.3, 0.5)
    )
    mask = torch.arange(T) < torch.tensor([6, 3, 0, 5])[:, None]
    sampling[0, 2] = math.nan
    old[~mask] = sampling[~mask] = math.nan
    return {
        "logits": logits,
        "ids": ids,
        "logps": logps,
        "old": old,
        "sampling": sampling,
        "mask": mask,
        "A": torch.tensor([1.5, 0.0, 2.0, -1.0]),
    }


SPEC = rw.methods.grpo(entropy_coef=0.1).with_weight(rw.weights.TruncatedImportance())


def evaluate(data, backend="reference", plan="auto", spec=SPEC, **more):
    given = {
        "old_per_token_logps": data["old"],
        "sampling_per_token_logps": data["sampling"],
        "completion_mask": data["mask"],
        **more,
    }
    return rw.policy_loss(
        data["logits"], data["ids"], data["A"], spec=spec, backend=backend, plan=plan, **given
    )


@pytest.mark.parametrize(
    ("backend", "plan"), [("reference", "one_pass"), ("reference", "two_pass"), ("cpu", "one_pass")]
)
def test_they_are_the_loops(data, backend, plan):
    if backend == "cpu":
        data = {**data, "logits": data["logits"].detach().float().requires_grad_()}
    try:
        out = evaluate(data, backend, plan)
    except rw.BackendUnavailable as error:
        pytest.skip(str(error))
    got = out.diagnostics.as_floats()
    where = data["mask"].nonzero().tolist()
    p = [math.exp(data["logps"][i, t]) for i, t in where]
    H = [
        float(-(x.exp() * x).sum())
        for x in (data["logits"].detach()[i, t].log_softmax(-1) for i, t in where)
    ]
    coef = [float(out.coef[i, t]) for i, t in where]
    size = [abs(c) * (1 - x) for c, x in zip(coef, p, strict=True)]
    order = sorted(range(len(p)), key=p.__getitem__)
    for k in range(4):
        quarter = [order[r] for r in range(len(p)) if 4 * r // len(p) == k]
        assert got[f"grad_share/q{k + 1}"] == pytest.approx(
            sum(size[i] for i in quarter) / sum(size), rel=1e-5
        )
    change = sum(c * x * (1 - x) * (math.log(x) + h) for c, x, h in zip(coef, p, H, strict=True))
    assert got["entropy_change"] == pytest.approx(change, rel=1e-5)
    assert got["frac_advantage_zero"] == pytest.approx(3 / 14)
    r = [math.exp(data["logps"][i, t] - data["old"][i, t]) for i, t in where]
    assert got["ratio/eff_sample_size"] == pytest.approx(
        sum(r) ** 2 / sum(x * x for x in r) / 14, rel=1e-5
    )
    d = [
        float(data["old"][i, t] - data["sampling"][i, t])
        for i, t in where
        if not data["sampling"][i, t].isnan()
    ]
    assert len(d) == 13
    w = [math.exp(x) for x in d]
    moved = [
        abs(math.exp(data["old"][i, t]) - math.exp(data["sampling"][i, t]))
        for i, t in where
        if not data["sampling"][i, t].isnan()
    ]
    for name, want in {
        "sampling_logp_difference/mean": sum(map(abs, d)) / 13,
        "sampling_logp_difference/max": max(map(abs, d)),
        "kl": -sum(d) / 13,
        "sampling_prob_difference/mean": sum(moved) / 13,
        "sampling_prob_difference/max": max(moved),
        "k3_kl": sum(math.exp(x) - x - 1 for x in d) / 13,
        "importance_sampling_ratio/min": min(w),
        "importance_sampling_ratio/mean": sum(w) / 13,
        "importance_sampling_ratio/max": max(w),
        "eff_sample_size": sum(w) ** 2 / sum(x * x for x in w) / 13,
    }.items():
        assert got[f"sampling/{name}"] == pytest.approx(want, rel=1e-5), name


def test_the_entropy_change_is_that_of_a_step(data):
    """To first order, a step of each token's own logit against its gradient changes the
    mean of entropies by this.
    """
    out = evaluate(data, spec=rw.methods.grpo(), sampling_per_token_logps=None)
    z, step = data["logits"].detach(), 1e-6
    own = (
        torch.nn.functional.one_hot(data["ids"], V)
        * (out.coef * -torch.expm1(data["logps"]))[..., None]
    )

    def entropy(x):
        return -(x.softmax(-1) * x.log_softmax(-1)).sum(-1)[data["mask"]].sum()

    want = (entropy(z - step * own) - entropy(z + step * own)) / (2 * step)
    assert float(out.diagnostics["entropy_change"]) == pytest.approx(float(want), rel=1e-4)


def test_nothing_is_computed_unless_read(data, monkeypatch):
    from reweight_ops._core.engine import output

    calls = []
    monkeypatch.setattr(
        output,
        "policy_diagnostics",
        lambda *a: calls.append(a) or rw.Metrics((), torch.zeros(0, 2)),
    )
    out = evaluate(data)
    float(out.metrics["entropy"]), out.coef, repr(out)
    assert not calls
    for _ in range(2):
        assert len(out.diagnostics) == 0
    assert len(calls) == 1


def test_only_what_applies_and_parts_combine(data):
    sft = rw.policy_loss(data["logits"], data["ids"], None, spec="sft").diagnostics
    assert tuple(sft) == (
        "grad_share/q1",
        "grad_share/q2",
        "grad_share/q3",
        "grad_share/q4",
        "entropy_change",
    )
    logps = rw.policy_loss_from_logps(
        data["logps"].clone().requires_grad_(), data["A"], spec="reinforce"
    ).diagnostics
    assert "entropy_change" not in logps and float(logps["frac_advantage_zero"]) == 0.25
    whole, parts = evaluate(data, spec=SPEC.replace(reduction=rw.TokenSum())).diagnostics, []
    for rows in (slice(0, 1), slice(1, 4)):
        part = {k: x[rows] for k, x in data.items()}
        parts.append(evaluate(part, spec=SPEC.replace(reduction=rw.TokenSum())).diagnostics)
    combined = rw.Metrics.combine(parts).as_floats()
    exact = [name for name in combined if "share" not in name and "eff" not in name]
    assert len(exact) == 11
    assert {k: combined[k] for k in exact} == pytest.approx(
        {k: whole.as_floats()[k] for k in exact}
    )


def test_names_of_verl(data):
    names = evaluate(data).diagnostics.as_floats("verl")
    for name in (
        "kl",
        "k3_kl",
        "rollout_is_eff_sample_size",
        "rollout_is_min",
        "rollout_is_mean",
        "rollout_is_max",
    ):
        assert f"rollout_corr/{name}" in names
    assert "actor/grad_share/q1" in names and "actor/entropy_change" in names


def test_empty_calls_and_compiled_graphs(data):
    empty = evaluate(data, completion_mask=torch.zeros(B, T)).diagnostics.as_floats()
    assert all(x == 0 or math.isnan(x) for x in empty.values())

    def read(logits):
        return evaluate({**data, "logits": logits}).diagnostics["entropy_change"]

    change = torch.compile(read, backend="aot_eager", fullgraph=True)(data["logits"])
    torch.testing.assert_close(change, evaluate(data).diagnostics["entropy_change"])
    out = _pytree.tree_unflatten(*reversed(_pytree.tree_flatten(evaluate(data))))
    with pytest.raises(rw.UnsupportedRequest, match="read them in the function that is compiled"):
        out.diagnostics  # noqa: B018


def test_the_ranking_accuracy_of_pairs_is_of_likelihoods():
    """By rewards both pairs are right; by likelihood one is."""
    logps, ref = (
        torch.tensor([[-1.0], [-3.0], [-2.0], [-2.0]]),
        torch.tensor([[-2.0], [-5.0], [-2.0], [-2.0]]),
    )
    out = rw.preference_loss_from_logps(logps, spec=preference.dpo(), ref_per_token_logps=ref)
    assert (
        float(out.metrics["rewards/accuracies"]) == 1.0
        and float(out.metrics["logps/accuracies"]) == 0.5
    )


def test_reading_them_takes_no_pass_over_the_vocabulary(data):
    """Reading them computes only data of the size of the rows: it reads none of the
    4000 logits of 12 tokens again.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **(kwargs or {}))
            sizes.extend(
                x.numel()
                for x in _pytree.tree_leaves((args, kwargs, result))
                if isinstance(x, torch.Tensor)
            )
            return result

    vocab = 4000
    logits = torch.randn(B, T, vocab, requires_grad=True)
    out = evaluate({**data, "logits": logits})
    out.loss.backward()
    with Sizes():
        out.diagnostics.as_floats()
    assert sizes and max(sizes) < vocab, max(sizes)
