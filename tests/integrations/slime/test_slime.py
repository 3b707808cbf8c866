"""slime's loss by one call of the op, against a transcription of slime's own. CPU;
Megatron's sizes are a stand-in.
"""

import sys
import types

import pytest
import torch
from paths import ROOT
from slime_oracle import policy_loss, reducer

import reweight_ops as rw

V = 31
TOTALS, RESPONSES = [9, 5, 12], [6, 3, 7]
DEFAULTS = {
    "advantage_estimator": "grpo", "eps_clip": 0.2, "eps_clip_high": 0.28, "eps_clip_c": None, "use_tis": False, "tis_clip": 1.3, "tis_clip_low": 0.7,
    "use_opsm": False, "opsm_delta": 0.05, "use_kl_loss": False, "kl_loss_type": "k3", "kl_loss_coef": 0.1, "use_unbiased_kl": False, "entropy_coef": 0.0,
    "use_rollout_logprobs": False, "rollout_temperature": 0.8, "rollout_top_p": 1.0, "get_mismatch_metrics": False, "calculate_per_token_loss": False,
}  # fmt: skip
OPTIONS = {
    "plain": {}, "dual clip": {"eps_clip_c": 1.1}, "k3": {"use_kl_loss": True}, "k1": {"use_kl_loss": True, "kl_loss_type": "k1"},
    "low_var_kl": {"use_kl_loss": True, "kl_loss_type": "low_var_kl"}, "entropy": {"entropy_coef": 0.05}, "sampler's": {"use_rollout_logprobs": True},
    "tis": {"use_tis": True}, "opsm": {"use_opsm": True, "opsm_delta": -1.0}, "unbiased": {"use_kl_loss": True, "use_unbiased_kl": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def mpu():
    module = types.ModuleType("megatron.core.mpu")
    module.get_tensor_model_parallel_world_size = module.get_context_parallel_world_size = lambda: 1
    return module


@pytest.fixture(scope="module")
def slime(mpu):
    with pytest.MonkeyPatch.context() as patch:
        core = types.ModuleType("megatron.core")
        core.mpu = mpu
        for name, module in (
            ("megatron", types.ModuleType("megatron")),
            ("megatron.core", core),
            ("megatron.core.mpu", mpu),
        ):
            patch.setitem(sys.modules, name, module)
        from reweight_ops.integrations import slime
    return slime


@pytest.fixture
def batch():
    """Three samples, two of one rollout, in 28 positions of which 2 are padding; masked
    tokens of the responses have no log-probs.
    """
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 28, V, generator=g).mul(1.5).requires_grad_()
    tokens = [torch.randint(V, (n,), generator=g) for n in TOTALS]
    masks = [(torch.rand(r, generator=g) > 0.2).float() for r in RESPONSES]
    near, end = [], 0
    for ids, total, response in zip(tokens, TOTALS, RESPONSES, strict=True):
        end += total
        rows = (logits.detach()[0, end - response - 1 : end - 1] / 0.8).log_softmax(-1)
        near.append(rows.gather(-1, ids[-response:, None])[:, 0])
    drawn = lambda scale: [x + scale * torch.randn(x.shape, generator=g) for x in near]  # noqa: E731
    rollout = masks[0].sum() + masks[1].sum()
    return logits, {
        "unconcat_tokens": tokens, "total_lengths": TOTALS, "response_lengths": RESPONSES, "loss_masks": masks, "log_probs": drawn(0.3),
        "rollout_log_probs": drawn(0.4), "ref_log_probs": drawn(0.3), "advantages": [torch.full((r,), a) for r, a in zip(RESPONSES, (1.2, -0.7, 0.9), strict=True)],
        "rollout_mask_sums": [rollout, rollout, masks[2].sum()],
    }  # fmt: skip


def run(function, args, logits, batch):
    reduce = reducer(
        batch["response_lengths"],
        batch["loss_masks"],
        batch["rollout_mask_sums"],
        args.calculate_per_token_loss,
    )
    value, metrics = function(args, batch, logits, reduce)
    (grad,) = torch.autograd.grad(value, logits)
    return value.detach(), grad, {name: float(x.detach()) for name, x in metrics.items()}


def arguments(**changes):
    return types.SimpleNamespace(**(DEFAULTS | changes))


@pytest.mark.parametrize("per_token", [False, True], ids=["rollout mean", "token sum"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("estimator", ["grpo", "gspo", "cispo"])
def test_slimes_own_loss(slime, batch, estimator, options, per_token):
    """Loss, gradient by the logits, and every metric."""
    args = arguments(
        advantage_estimator=estimator, calculate_per_token_loss=per_token, **OPTIONS[options]
    )
    logits, data = batch
    if estimator == "gspo" and options == "unbiased":
        with pytest.raises(rw.UnsupportedRequest, match="use_unbiased_kl"):
            slime.spec_of(args)
        return
    theirs, ours = (run(function, args, logits, data) for function in (policy_loss, slime.loss))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    assert theirs[1].norm() > 1e-3 and (ours[1] - theirs[1]).norm() <= 1e-6 * theirs[1].norm()
    # which count their own clips
    skipped = ("pg_clipfrac",) if "eps_clip_c" in OPTIONS[options] or estimator == "cispo" else ()
    for name, value in theirs[2].items():
        if name not in skipped:
            assert ours[2][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def with_top_p(logits, data):
    """The batch with what a sampler kept of every response token, which is in it."""
    g, ids, offsets = torch.Generator().manual_seed(1), [], []
    for tokens, response in zip(data["unconcat_tokens"], RESPONSES, strict=True):
        kept = (torch.rand(response, V, generator=g) < 0.3).scatter(
            -1, tokens[-response:, None], True
        )
        ids.append(kept.nonzero()[:, 1].int())
        offsets.append(torch.cat([torch.zeros(1), kept.sum(-1).cumsum(0)]).int())
    return data | {"rollout_top_p_token_ids": ids, "rollout_top_p_token_offsets": offsets}


@pytest.mark.parametrize("options", ["plain", "entropy", "k3", "tis"])
@pytest.mark.parametrize("estimator", ["grpo", "gspo"])
def test_top_p_is_of_the_log_probs_and_not_of_the_entropy(slime, batch, estimator, options):
    logits, data = batch
    data = with_top_p(logits, data)
    args = arguments(advantage_estimator=estimator, rollout_top_p=0.9, **OPTIONS[options])
    theirs, ours = (run(function, args, logits, data) for function in (policy_loss, slime.loss))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    assert theirs[1].norm() > 1e-3 and (ours[1] - theirs[1]).norm() <= 1e-6 * theirs[1].norm()
    for name, value in theirs[2].items():
        assert ours[2][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    short = data | {
        "rollout_top_p_token_offsets": [x[:-1] for x in data["rollout_top_p_token_offsets"]]
    }
    with pytest.raises(
        rw.UnsupportedRequest, match="the op takes the kept ids of every response token"
    ):
        run(slime.loss, args, logits, short)


def test_on_policy_and_masked_tokens_that_are_no_numbers(slime, batch):
    logits, data = batch
    args = arguments()
    theirs = run(policy_loss, args, logits, data | {"log_probs": None})
    spoiled = [
        torch.where(m != 0, x, torch.nan)
        for m, x in zip(data["loss_masks"], data["rollout_log_probs"], strict=True)
    ]
    ours = run(slime.loss, args, logits, data | {"log_probs": None, "rollout_log_probs": spoiled})
    assert (ours[1] - theirs[1]).norm() <= 1e-6 * theirs[1].norm()
    assert all(x == x for x in ours[2].values())


def test_the_batch_meets_the_branches(batch):
    logits, data = batch
    grads = {
        name: run(policy_loss, arguments(**changes), logits, data)[1]
        for name, changes in OPTIONS.items()
    }
    for name, grad in grads.items():
        assert name == "plain" or (grad - grads["plain"]).norm() > 1e-3 * grad.norm(), name
    assert run(policy_loss, arguments(), logits, data)[2]["pg_clipfrac"] > 0


@pytest.mark.parametrize("name", ["dapo", "advantage_reweighting", "grpo", "gspo_token"])
def test_a_method_by_name(slime, batch, name):
    """The method's own call on the response rows, with slime's reduction
    written out."""
    logits, data = batch
    per_token = isinstance(rw.method(name).reduction, rw.TokenMean)
    args = arguments(reweight_method=name, eps_clip_high=None, calculate_per_token_loss=per_token)
    loss, grad, _ = run(slime.loss, args, logits, data)
    rows, ends = [], 0
    for total, response in zip(TOTALS, RESPONSES, strict=True):
        ends += total
        rows.append(torch.arange(ends - response - 1, ends - 1))
    pad = lambda parts: torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)  # noqa: E731
    weights = [
        m / (1 if per_token else d)
        for m, d in zip(data["loss_masks"], data["rollout_mask_sums"], strict=True)
    ]
    out = rw.policy_loss(
        logits[0][pad(rows)],
        pad([t[-r:] for t, r in zip(data["unconcat_tokens"], RESPONSES, strict=True)]),
        pad(data["advantages"]),
        spec=rw.method(name),
        old_per_token_logps=pad(data["log_probs"]),
        completion_mask=pad(data["loss_masks"]),
        temperature=0.8,
    )
    expected = (out.per_token_loss * pad(weights)).sum()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-6)
    assert grad.norm() > 1e-3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rollout_top_p": 0.9}, rw.InvalidCall, "rollout_top_p=0.9 needs rollout_top_p_token_ids"),
        ({"custom_tis_function_path": "a.b"}, rw.UnsupportedRequest, "custom_tis_function_path"),
        ({"get_mismatch_metrics": True}, rw.UnsupportedRequest, "get_mismatch_metrics"),
        ({"reweight_method": "dapo", "eps_clip_high": 0.28, "calculate_per_token_loss": True}, rw.InvalidCall, "eps_clip_high=0.28 would have no effect"),
        ({"reweight_method": "dapo", "eps_clip_high": None}, rw.InvalidCall, "set --calculate-per-token-loss"),
        ({"reweight_method": "grpo", "eps_clip_high": None, "calculate_per_token_loss": True}, rw.InvalidCall, "leave out --calculate-per-token-loss"),
        ({"reweight_method": "sft", "eps_clip_high": None, "calculate_per_token_loss": True}, rw.UnsupportedRequest, "does not read advantages"),
        ({"reweight_method": "kl_cov", "eps_clip_high": None, "calculate_per_token_loss": True}, rw.UnsupportedRequest, "level batch, and a micro-batch"),
        ({"use_tis": True, "use_rollout_logprobs": True}, rw.UnsupportedRequest, "use_tis with use_rollout_logprobs"),
        ({"use_kl_loss": True, "kl_loss_type": "abs"}, rw.InvalidCall, "kl_loss_type is 'abs'"),
    ],
)  # fmt: skip
def test_refusals(slime, batch, changes, error, message):
    with pytest.raises(error, match=message):
        run(slime.loss, arguments(**changes), *batch)


def test_parallelism_is_refused(slime, mpu, batch, monkeypatch):
    monkeypatch.setattr(mpu, "get_tensor_model_parallel_world_size", lambda: 2)
    with pytest.raises(rw.UnsupportedRequest, match="tensor parallelism of 2"):
        run(slime.loss, arguments(), *batch)


def test_the_example(slime):
    yaml = pytest.importorskip("yaml")
    chosen = yaml.safe_load((ROOT / "examples" / "slime.yaml").read_text())
    spec = slime.spec_of(arguments(**chosen, eps_clip_high=None, calculate_per_token_loss=True))
    assert spec.weights == rw.methods.advantage_reweighting(alpha=0.3).weights
