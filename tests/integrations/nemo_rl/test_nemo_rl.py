"""NeMo-RL's loss by our op, from logits and from log-probs, against a transcription of
its own. CPU.
"""

import importlib
import pickle
import types

import nemo_rl_oracle as oracle
import pytest
import torch
from paths import ROOT

import reweight_ops as rw

V, B, S = 37, 4, 12
OPTIONS = {
    "grpo": {}, "asymmetric": {"ratio_clip_max": 0.28}, "dual clip": {"ratio_clip_c": 1.1}, "sample mean": {"token_level_loss": False},
    "gspo": {"sequence_level_importance_ratios": True, "token_level_loss": False, "ratio_clip_min": 0.02, "ratio_clip_max": 0.02},
    "reinforce": {"disable_ppo_ratio": True}, "cispo": {"use_cispo": True}, "on policy": {"force_on_policy_ratio": True},
    "k1": {"reference_policy_kl_type": "k1"}, "k2": {"reference_policy_kl_type": "k2", "token_level_loss": False},
    "bounds": {"kl_input_clamp_value": 0.3, "kl_output_clamp_value": 0.03}, "no bounds": {"kl_input_clamp_value": None, "kl_output_clamp_value": None},
    "no kl": {"reference_policy_kl_penalty": 0}, "kl in reward": {"use_kl_in_reward": True},
    "correction": {}, "tis": {"kind": "tis", "high": 1.1}, "tis from": {"kind": "tis", "high": 1.1, "low": 0.9},
    "icepop": {"kind": "icepop", "high": 1.2, "low": 0.8}, "seq-mask-tis": {"kind": "seq-mask-tis", "high": 1.02, "low": 0.9},
}  # fmt: skip


def options(name):
    """The configuration of one row of the table; ``kind``, ``low`` and ``high`` are the
    correction's.
    """
    given = dict(OPTIONS[name])
    kind, low, high = (given.pop(n, None) for n in ("kind", "low", "high"))
    if kind is not None or name == "correction":
        given |= {
            "use_importance_sampling_correction": True,
            "truncated_importance_sampling_type": kind,
        }
        given |= {
            "truncated_importance_sampling_ratio": high,
            "truncated_importance_sampling_ratio_min": low,
        }
    return oracle.ClippedPGLossConfig(**{"reference_policy_kl_penalty": 0.1} | given)


def master(cfg, policy=None, skip=False):
    policy = {
        "dtensor_cfg": {"enabled": True, "tensor_parallel_size": 1, "context_parallel_size": 1},
        "generation": {"top_k": None, "top_p": 1.0},
    } | (policy or {})
    return types.SimpleNamespace(
        loss_fn=cfg,
        policy=policy,
        grpo=types.SimpleNamespace(skip_reference_policy_logprobs_calculation=skip),
    )


@pytest.fixture(scope="module")
def nemo():
    with pytest.MonkeyPatch.context() as patch:
        oracle.install(patch)
        from reweight_ops.integrations import nemo_rl

        yield nemo_rl


@pytest.fixture
def batch():
    """Four samples, one dropped by its sample mask, prompts and ends masked."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(B, S, V, generator=g).mul(1.5).requires_grad_()
    ids = torch.randint(V, (B, S), generator=g)
    at = torch.arange(S)
    token_mask = ((at >= 3) & (at < torch.tensor([12, 7, 10, 12])[:, None])).float()
    with torch.no_grad():
        own = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    near = lambda scale: torch.nn.functional.pad(  # noqa: E731
        (own + scale * torch.randn(own.shape, generator=g)).clamp(max=0), (1, 0)
    )
    data = {
        "input_ids": ids,
        "token_mask": token_mask,
        "sample_mask": torch.tensor([1.0, 1.0, 1.0, 0.0]),
        "advantages": torch.randn(B, S, generator=g),
        "prev_logprobs": near(0.3),
        "generation_logprobs": near(0.4),
        "reference_policy_logprobs": near(0.3),
    }
    return logits, data


COUNTS = torch.tensor(7.0), torch.tensor(41.0)


def run(loss_fn, batch, counts=COUNTS):
    logits, data = batch
    value, metrics = oracle.loss_of(loss_fn, logits, data, *counts)
    return value.detach(), torch.autograd.grad(value, logits)[0], metrics


def assert_same(theirs, ours):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    assert theirs[1].norm() > 1e-3 and (theirs[1] - ours[1]).norm() <= 1e-6 * theirs[1].norm()


@pytest.mark.parametrize("logits", [False, True], ids=["log-probs", "logits"])
@pytest.mark.parametrize("name", OPTIONS)
def test_their_own_loss(nemo, batch, name, logits):
    """Loss, gradient by the logits, and every metric, divided by the counts of a global
    batch.
    """
    cfg = options(name)
    theirs = run(oracle.ClippedPGLossFn(cfg), batch)
    loss_fn = nemo.PolicyLoss(master(cfg), logits=logits)
    ours = run(loss_fn, batch)
    assert_same(theirs, ours)
    for metric, value in theirs[2].items():
        assert ours[2][metric] == pytest.approx(value, rel=1e-5, abs=2e-6), metric
    assert set(ours[2]) == set(loss_fn.metric_normalizations)
    assert loss_fn.loss_type == oracle.ClippedPGLossFn(cfg).loss_type


def test_the_batch_meets_the_branches(batch):
    """No two rows of the table are the same loss, but for those that are: the
    comparison above would prove little.
    """
    losses = {name: run(oracle.ClippedPGLossFn(options(name)), batch) for name in OPTIONS}
    same = {frozenset(pair) for pair in (("grpo", "no bounds"), ("no kl", "kl in reward"))}
    for name, (value, grad, _) in losses.items():
        for other in set(losses) - {name}:
            if frozenset((name, other)) not in same:
                moved = (grad - losses[other][1]).norm() > 1e-3 * grad.norm() or (
                    value - losses[other][0]
                ).abs() > 1e-3
                assert moved, (name, other)


def test_one_pass_from_logits(nemo):
    assert (
        nemo.PolicyLoss(master(options("grpo")), logits=True).spec.one_pass_unsupported_reason
        is None
    )


@pytest.mark.parametrize("logits", [False, True], ids=["log-probs", "logits"])
def test_packed_sequences_of_which_each_is_padded(nemo, batch, logits):
    """``SequencePackingLossWrapper`` around both losses."""
    logits_in, data = batch
    lengths, padded = [12, 7, 10, 12], [14, 8, 10, 16]
    data = data | {
        k: torch.where(torch.arange(S) < torch.tensor(lengths)[:, None], v, 0)
        for k, v in data.items()
        if v.ndim > 1
    }
    packed = torch.cat(
        [
            torch.cat([logits_in[i, :n], logits_in.new_zeros(room - n, V)])
            for i, (n, room) in enumerate(zip(lengths, padded, strict=True))
        ]
    )[None]
    results = []
    for loss_fn in (
        oracle.ClippedPGLossFn(options("sample mean")),
        nemo.PolicyLoss(master(options("sample mean")), logits=logits),
    ):
        value = oracle.packed_loss_of(loss_fn, packed, data, *COUNTS, lengths, padded)
        results.append(
            (value.detach(), torch.autograd.grad(value, logits_in, retain_graph=True)[0])
        )
    assert_same(*results)


def test_counts_of_one_step_may_come_later(nemo, batch):
    """The split API passes 1 and divides once a step."""
    loss_fn = nemo.PolicyLoss(master(options("grpo")))
    whole, raw = run(loss_fn, batch), run(loss_fn, batch, (torch.tensor(1.0), torch.tensor(1.0)))
    torch.testing.assert_close(raw[1] / 41, whole[1], rtol=1e-6, atol=1e-9)
    assert raw[2]["gen_kl_error"] / 41 == pytest.approx(whole[2]["gen_kl_error"], rel=1e-5)


def test_numbers_of_masked_tokens_do_not_matter(nemo, batch):
    logits, data = batch
    loss_fn = nemo.PolicyLoss(master(options("tis")), logits=True)
    out = data["token_mask"] * data["sample_mask"][:, None] == 0
    spoiled = {
        k: torch.where(out, torch.nan, v) if k.endswith("logprobs") else v for k, v in data.items()
    }
    clean, dirty = run(loss_fn, batch), run(loss_fn, (logits, spoiled))
    assert torch.equal(clean[1], dirty[1]) and clean[2] == dirty[2]


@pytest.mark.parametrize("logits", [False, True], ids=["log-probs", "logits"])
@pytest.mark.parametrize("name", ["advantage_reweighting", "gspo", "luspo", "gmpo", "dppo_kl"])
def test_a_method_by_name(nemo, batch, name, logits):
    """The op's own call on the response rows, by the global counts, plus
    NeMo-RL's KL."""
    by_token = isinstance(rw.method(name).reduction, rw.TokenMean)
    cfg = oracle.ClippedPGLossConfig(token_level_loss=by_token, reference_policy_kl_penalty=0.0)
    loss, grad, _ = run(nemo.PolicyLoss(master(cfg), name, logits=logits), batch)
    z, data = batch
    after = {k: v[:, 1:] for k, v in data.items() if v.ndim > 1}
    mask = after["token_mask"] * data["sample_mask"][:, None]
    advantages = (
        (after["advantages"] * mask).sum(-1) / mask.sum(-1).clamp(min=1)
        if name == "gmpo"
        else after["advantages"]
    )
    count = {"num_items_in_batch": 41.0} if by_token else {"num_sequences_in_batch": 7.0}
    out = rw.policy_loss(
        z[:, :-1],
        after["input_ids"],
        advantages,
        spec=name,
        old_per_token_logps=after["prev_logprobs"],
        completion_mask=mask,
        unused="ignore",
        **count,
    )
    assert_same((out.loss.detach(), torch.autograd.grad(out.loss, z)[0]), (loss, grad))
    with_kl = nemo.PolicyLoss(master(oracle.ClippedPGLossConfig(token_level_loss=by_token)), name)
    assert [p.coef for p in with_kl.spec.penalties] == [0.01]


def test_entropies_have_gradients_from_logits(nemo, batch):
    cfg = oracle.ClippedPGLossConfig(reference_policy_kl_penalty=0.0)
    plain, bonus = (
        run(nemo.PolicyLoss(master(cfg), rw.methods.dapo(entropy_coef=c), logits=True), batch)
        for c in (0.0, 0.1)
    )
    assert (plain[1] - bonus[1]).norm() > 1e-3 * plain[1].norm()


def test_it_travels_to_the_workers(nemo, batch):
    loss_fn = nemo.PolicyLoss(master(options("gspo")), logits=True)
    sent = pickle.loads(pickle.dumps(loss_fn))
    assert torch.equal(run(loss_fn, batch)[1], run(sent, batch)[1])


TENSOR = {"dtensor_cfg": {"enabled": True, "tensor_parallel_size": 2, "context_parallel_size": 1}}
MEGATRON = {
    "megatron_cfg": {
        "enabled": True,
        "tensor_model_parallel_size": 1,
        "context_parallel_size": 2,
        "use_fused_linear_logprobs": True,
    }
}
TOP_K = {"generation": {"top_k": 50, "top_p": 1.0}}


@pytest.mark.parametrize(
    ("policy", "given", "error", "message"),
    [
        (TENSOR, {"logits": True}, rw.UnsupportedRequest, "tensor parallelism of 2"),
        (MEGATRON, {"logits": True}, rw.UnsupportedRequest, "context parallelism of 2.*use_fused_linear_logprobs: there are no logits"),
        (TOP_K, {"logits": True}, rw.UnsupportedRequest, "log-probs over the kept tokens alone"),
        (TOP_K, {}, rw.UnsupportedRequest, "with a KL to the reference"),
        ({}, {"positive_example_nll_weight": 0.1}, rw.UnsupportedRequest, "reads rewards"),
        ({}, {"use_on_policy_kl_approximation": True}, rw.UnsupportedRequest, "use_on_policy_kl_approximation is not supported here"),
        ({}, {"ratio_clip_c": 3.0, "disable_ppo_ratio": True}, rw.UnsupportedRequest, "clips a log-prob"),
        ({}, {"reference_policy_kl_type": "k4"}, rw.InvalidCall, "reference_policy_kl_type is 'k4'"),
        ({}, {"spec": "dapo", "ratio_clip_max": 0.28}, rw.InvalidCall, "ratio_clip_max=0.28 of loss_fn would have no effect"),
        ({}, {"spec": "dapo", "use_importance_sampling_correction": True}, rw.InvalidCall, "use_importance_sampling_correction=True"),
        ({}, {"spec": "gspo"}, rw.InvalidCall, "set loss_fn.token_level_loss=False"),
        ({}, {"spec": rw.methods.grpo(beta=0.1), "token_level_loss": False}, rw.UnsupportedRequest, "it has a KL penalty"),
        ({}, {"spec": rw.methods.dapo(entropy_coef=0.1)}, rw.UnsupportedRequest, "it reads entropy"),
        ({}, {"spec": rw.methods.dr_grpo(horizon=None), "token_level_loss": False}, rw.UnsupportedRequest, "pass a horizon"),
        ({}, {"spec": "sft"}, rw.UnsupportedRequest, "does not read advantages"),
        ({}, {"spec": "kl_cov"}, rw.UnsupportedRequest, "level batch"),
        ({}, {"skip": True}, rw.UnsupportedRequest, "skip_reference_policy_logprobs_calculation leaves out"),
    ],
)  # fmt: skip
def test_refusals(nemo, policy, given, error, message):
    given = dict(given)
    spec, logits, skip = (
        given.pop("spec", None),
        given.pop("logits", False),
        given.pop("skip", False),
    )
    with pytest.raises(error, match=message):
        nemo.PolicyLoss(
            master(oracle.ClippedPGLossConfig(**given), policy, skip), spec, logits=logits
        )


def test_the_example(nemo, batch, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("nemo_rl_loss")
    loss_fn = example.loss_fn(master(oracle.ClippedPGLossConfig()))
    assert loss_fn.input_type is oracle.LossInputType.LOGIT and run(loss_fn, batch)[1].norm() > 1e-3
