"""Methods in SkyRL's registry, against a transcription of SkyRL's losses and of the
reduction it folds into the advantages. CPU.
"""

import importlib
import math
import pickle

import pytest
import skyrl_oracle as oracle
import torch
from paths import ROOT

import reweight_ops as rw
from reweight_ops.rules.surrogates import DppoTV

#: A loss of SkyRL's, and the spec that says the same; where the value has the log-prob
#: instead of the ratio, the gradient is compared.
REGULAR = rw.methods.ppo()
LOSSES = {
    "regular": REGULAR,
    "dual_clip": rw.methods.dual_clip_ppo(clip_ratio_c=1.1),
    "sapo": rw.methods.sapo(temperature_neg=1.05),
    "gspo": rw.methods.gspo_token(epsilon_low=0.2, epsilon_high=0.2),
    "cispo": rw.methods.cispo(ratio_min=0.2, ratio_max=1.5),
    "dppo": rw.PolicyLossSpec(
        surrogate=DppoTV(divergence_low=0.1, divergence_high=0.1, ratio_max=math.inf), name="dppo"
    ),
}
REDUCTIONS = {
    "token_mean": rw.TokenMean(),
    "sequence_mean": rw.SequenceMean(),
    "seq_mean_token_sum_norm": rw.SequenceMean(per="constant"),
    "prompt_mean": rw.TokenSum(),
}
CORRECTIONS = {
    "none": {},
    "tis": {"tis_ratio_type": "token"},
    "sequence tis": {"tis_ratio_type": "sequence"},
    "mask": {"sequence_mask_metric": "geometric"},
}


@pytest.fixture(scope="module")
def skyrl():
    with pytest.MonkeyPatch.context() as patch:
        oracle.install(patch)
        from reweight_ops.integrations import skyrl

        yield skyrl


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(
        oracle.PolicyLossRegistry, "_functions", {kind: oracle.policy_loss(kind) for kind in LOSSES}
    )


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(5)
    shape = (6, 10)
    old = -3 * torch.rand(shape, generator=g)
    lengths = torch.tensor([10, 0, 4, 7, 2, 10])
    noise = lambda scale: scale * torch.randn(shape, generator=g)  # noqa: E731
    return {
        "log_probs": (old + noise(0.5)).clamp(max=-1e-3).requires_grad_(),
        "old_log_probs": old,
        "advantages": noise(1.0),
        "loss_mask": (torch.arange(10) < lengths[:, None]).float(),
        "rollout_logprobs": (old + noise(0.1)).clamp(max=-1e-3),
    }


def run(name, batch, cfg):
    """A micro-batch of one mini-batch, as the worker calls its loss."""
    given = batch | {"advantages": oracle.reduced(batch["advantages"], batch["loss_mask"], cfg)}
    value, metrics = oracle.PolicyLossRegistry.get(name)(**given, config=cfg)
    return value.detach(), torch.autograd.grad(value, batch["log_probs"])[0], metrics


#: SkyRL's dppo is against the sampler already, and a truncated ratio to it is refused
#: (tested below).
CASES = [
    (k, r, c)
    for k in LOSSES
    for r in REDUCTIONS
    for c in CORRECTIONS
    if k != "dppo" or "tis_ratio_type" not in CORRECTIONS[c]
]


@pytest.mark.parametrize(("kind", "reduction", "correction"), CASES)
def test_their_losses_as_registered_specs(skyrl, batch, kind, reduction, correction):
    given = {"loss_reduction": reduction, "max_seq_len": 64, **CORRECTIONS[correction]}
    theirs = run(kind, batch, oracle.config(clip_ratio_c=1.1, **given))
    spec = LOSSES[kind].replace(reduction=REDUCTIONS[reduction])
    skyrl.register({"mine": skyrl.PolicyLoss(spec, anchor="rollout" if kind == "dppo" else "old")})
    ours = run("mine", batch, oracle.config(**given))
    assert theirs[1].norm() > 1e-3 and (theirs[1] - ours[1]).norm() <= 1e-6 * theirs[1].norm()
    if kind != "dppo":
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-7)
    assert ours[2].keys() >= theirs[2].keys() | {"clip_ratio"} and all(
        isinstance(v, float) for v in ours[2].values()
    )


def test_the_batch_meets_the_branches(batch):
    """Every correction and every loss is another one here."""
    found = [
        run(kind, batch, oracle.config(clip_ratio_c=1.1, **c))[1]
        for kind in LOSSES
        for c in CORRECTIONS.values()
    ]
    assert all((a - b).norm() > 1e-3 * a.norm() for i, a in enumerate(found) for b in found[:i])


def test_every_method_has_a_name_or_a_reason(skyrl, batch):
    names = skyrl.register()
    reasons = skyrl.left_out()
    assert {n.removeprefix("rw_") for n in names} | set(reasons) == set(rw.METHODS) and len(
        names
    ) >= 15
    for name, reason in {
        "kl_cov": "level batch",
        "sft": "does not read advantages",
        "luspo": "not one of SkyRL's",
        "gmpo": "one advantage per sequence",
    }.items():
        assert reason in reasons[name]
    for name in names:
        kind = type(rw.method(name.removeprefix("rw_")).reduction).__name__
        reduction = {"TokenMean": "token_mean", "SequenceMean": "sequence_mean"}[kind]
        if name == "rw_dr_grpo":
            reduction = "seq_mean_token_sum_norm"
        assert (
            run(name, batch, oracle.config(loss_reduction=reduction, max_seq_len=64))[1].norm()
            > 1e-3
        )


def test_a_loss_that_does_not_follow_the_size_of_the_advantage_is_refused(skyrl):
    """SkyRL divides advantages by the counts, so a term without them would be summed
    over all tokens.
    """
    for spec in (
        rw.methods.dro(beta=0.1),
        REGULAR.with_weight(rw.weights.ProbabilityInterval(lower=0.1, upper=0.9)),
        rw.methods.topr(level="token"),
    ):
        follows = spec.name != "dro"
        assert skyrl._follows_advantages(spec) is follows
    with pytest.raises(rw.UnsupportedRequest, match="not proportional to the advantage's size"):
        skyrl.PolicyLoss(rw.methods.dro(beta=0.1))


def test_numbers_of_masked_tokens_do_not_matter(skyrl, batch):
    skyrl.register({"mine": REGULAR})
    clean = run("mine", batch, oracle.config())
    spoiled = torch.where(batch["loss_mask"] == 0, torch.nan, batch["old_log_probs"])
    dirty = run("mine", batch | {"old_log_probs": spoiled}, oracle.config())
    assert torch.equal(clean[1], dirty[1]) and clean[2] == dirty[2]


def test_it_travels_to_the_workers(skyrl, batch):
    """The registry is a ray actor: a loss is pickled."""
    skyrl.register({"mine": REGULAR})
    sent = pickle.loads(pickle.dumps(oracle.PolicyLossRegistry.get("mine")))
    oracle.PolicyLossRegistry.register("sent", sent)
    assert torch.equal(
        run("mine", batch, oracle.config())[1], run("sent", batch, oracle.config())[1]
    )


@pytest.mark.parametrize(
    ("spec", "config", "error", "message"),
    [
        (rw.methods.grpo(beta=0.1), {}, rw.UnsupportedRequest, "it has penalties, and SkyRL adds its own"),
        ("npo", {}, rw.UnsupportedRequest, "it reads ref_logp"),
        (REGULAR, {"loss_reduction": "sequence_mean"}, rw.InvalidCall, "set algorithm.loss_reduction=token_mean"),
        (REGULAR, {"loss_reduction": "prompt_mean"}, rw.InvalidCall, "which takes any"),
        (rw.methods.dr_grpo(horizon=9), {"loss_reduction": "seq_mean_token_sum_norm", "max_seq_len": 64}, rw.InvalidCall, "divides by 9"),
        (REGULAR, {"eps_clip_high": 0.3}, rw.InvalidCall, "eps_clip_high=0.3 would have no effect"),
        ("decoupled_ppo", {"tis_ratio_type": "token"}, rw.InvalidCall, "would do it twice"),
    ],
)  # fmt: skip
def test_refusals(skyrl, batch, spec, config, error, message):
    with pytest.raises(error, match=message):
        skyrl.register({"mine": skyrl.PolicyLoss(spec)})
        run("mine", batch, oracle.config(**config))


def test_the_anchor(skyrl, batch):
    with pytest.raises(rw.InvalidCall, match="anchor is 'sampler'"):
        skyrl.PolicyLoss(REGULAR, anchor="sampler")
    with pytest.raises(rw.InvalidCall, match="leave one of them out"):
        skyrl.PolicyLoss("decoupled_ppo", anchor="rollout")
    skyrl.register({"mine": skyrl.PolicyLoss(REGULAR, anchor="rollout")})
    with pytest.raises(rw.InvalidCall, match="would do it twice"):
        run("mine", batch, oracle.config(tis_ratio_type="token"))
    with pytest.raises(rw.InvalidCall, match="needs the sampler's log-probs"):
        run("mine", batch | {"rollout_logprobs": None}, oracle.config())


def test_nothing_is_registered_where_one_cannot_be(skyrl):
    with pytest.raises(rw.UnsupportedRequest):
        skyrl.register({"good": REGULAR, "bad": rw.methods.sft()})
    assert "good" not in oracle.PolicyLossRegistry._functions


def test_the_example(skyrl, batch, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    importlib.import_module("skyrl_main")
    assert run("likely_tokens_first", batch, oracle.config())[1].norm() > 1e-3
