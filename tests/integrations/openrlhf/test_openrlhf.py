"""OpenRLHF's own ``PolicyLoss`` and ``Actor`` beside ours. CPU; deepspeed, flash-attn,
ray and vLLM are stand-ins.
"""

import builtins
import importlib
import inspect
import itertools

import pytest
import torch
from paths import ROOT
from trainers import trainer
from transformers import Qwen2Config, Qwen2ForCausalLM

import reweight_ops as rw

MISSING = (
    "deepspeed",
    "flash_attn",
    "pylatexenc",
    "ring_flash_attn",
    "ray",
    "loralib",
    "optimum",
    "vllm",
    "flask",
    "uvicorn",
    "fastapi",
    "aiohttp",
    "torchdata",
)


@pytest.fixture(scope="module")
def rlhf():
    """``(openrlhf.models.actor, openrlhf.models.loss,
    openrlhf.trainer.ray.ppo_actor)``; ``torch.compile``, which it decorates with, is
    left out.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda f=None, **k: f if f is not None else lambda g: g)
        return trainer(
            "openrlhf",
            "openrlhf.models.actor",
            "openrlhf.models.loss",
            "openrlhf.trainer.ray.ppo_actor",
            missing=MISSING,
        )


@pytest.fixture(scope="module")
def integration(rlhf):
    from reweight_ops.integrations import openrlhf

    return openrlhf


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(5)
    old = -3 * torch.rand(6, 20, generator=g)
    mask = (torch.arange(20) < torch.randint(1, 21, (6, 1), generator=g)).float()
    mask[2] = 0  # an empty sample
    return {
        "log_probs": (old + 0.4 * torch.randn(6, 20, generator=g)).requires_grad_(),
        "old_log_probs": old,
        "advantages": torch.randn(6, 20, generator=g),
        "action_mask": mask,
        "rollout_log_probs": old + 0.3 * torch.randn(6, 20, generator=g),
    }


def run(loss, batch, **info):
    value, clip_ratio, ppo_kl, *_ = loss(**batch, **info)
    return (
        value.detach(),
        torch.autograd.grad(value, batch["log_probs"])[0],
        clip_ratio.item(),
        ppo_kl.item(),
    )


def spec(kind, dual_clip, token_mean, weights=()):
    sequence = kind == "gspo"
    surrogate = rw.rules.surrogates.Clip(epsilon_low=0.2, epsilon_high=0.28)
    if dual_clip is not None:
        surrogate = rw.rules.surrogates.DualClip(
            epsilon_low=0.2, epsilon_high=0.28, clip_ratio_c=dual_clip
        )
    ratio = rw.SequenceRatio(clamp=float("inf")) if sequence else rw.TokenRatio()
    reduction = rw.TokenMean() if token_mean else rw.SequenceMean(count="nonempty")
    return rw.PolicyLossSpec(surrogate=surrogate, ratio=ratio, reduction=reduction, weights=weights)


LOCAL, GLOBAL = (
    {},
    {"dp_size": 2, "batch_num_tokens": torch.tensor(77.0), "global_batch_size": torch.tensor(9.0)},
)
KINDS = [
    (k, d, t)
    for k, d, t in itertools.product(("ppo", "gspo"), (None, 1.3), (True, False))
    if k == "ppo" or not t
]


@pytest.mark.parametrize("info", [LOCAL, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize(("kind", "dual_clip", "token_mean"), KINDS)
def test_policy_loss(rlhf, integration, batch, kind, dual_clip, token_mean, info):
    """Loss, gradient, clipped share and drift of OpenRLHF's loss by ours."""
    theirs = run(rlhf[1].PolicyLoss(0.2, 0.28, dual_clip, token_mean, kind), batch, **info)
    ours = run(integration.PolicyLoss(spec(kind, dual_clip, token_mean)), batch, **info)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    assert theirs[1].norm() > 1e-3 and (ours[1] - theirs[1]).norm() <= 1e-6 * theirs[1].norm()
    assert ours[3] == pytest.approx(theirs[3], rel=1e-5)
    if kind == "ppo" and dual_clip is None:
        assert ours[2] == pytest.approx(theirs[2], rel=1e-5) and theirs[2] > 0.1


@pytest.mark.parametrize(
    ("mode", "weight"), [("clip", "TruncatedImportance"), ("mask", "MaskedImportance")]
)
def test_the_samplers_correction_is_a_weight_of_the_spec(rlhf, integration, batch, mode, weight):
    theirs = rlhf[1].PolicyLoss(
        0.2,
        0.28,
        is_correction_level="token",
        is_correction_mode=mode,
        is_correction_threshold=(0.8, 1.2),
    )
    weights = (getattr(rw.weights, weight)(ratio_min=0.8, ratio_max=1.2),)
    a, b = (
        run(theirs, batch, **GLOBAL),
        run(integration.PolicyLoss(spec("ppo", None, True, weights)), batch, **GLOBAL),
    )
    torch.testing.assert_close(b[0], a[0], rtol=1e-6, atol=1e-6)
    assert (a[1] - b[1]).norm() <= 1e-6 * a[1].norm()


@pytest.mark.parametrize("name", ["dapo", "gspo", "gmpo", "cispo", "advantage_reweighting"])
def test_methods_by_name(integration, batch, name):
    """A method by name is the op's own call; of GMPO the sample's advantage is the mean
    of its tokens'.
    """
    loss, grad, *_ = run(integration.PolicyLoss(name), batch, **GLOBAL)
    adv, mask = batch["advantages"], batch["action_mask"]
    adv = (adv * mask).sum(-1) / mask.sum(-1).clamp(min=1) if name == "gmpo" else adv
    counts = (
        {"num_items_in_batch": 38.5}
        if isinstance(rw.method(name).reduction, rw.TokenMean)
        else {"num_sequences_in_batch": 4.5}
    )
    out = rw.policy_loss_from_logps(
        batch["log_probs"],
        adv,
        spec=name,
        old_per_token_logps=batch["old_log_probs"],
        completion_mask=mask,
        **counts,
    )
    torch.testing.assert_close(loss, out.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        grad, torch.autograd.grad(out.loss, batch["log_probs"])[0], rtol=1e-6, atol=1e-9
    )


def test_actor(rlhf, integration):
    """Log-probs and entropies of a Qwen2 through ``Actor.forward``, left-padded, with a
    temperature; gradients of all parameters.
    """
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=515,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    module = rlhf[0]
    policy = module.Actor(Qwen2ForCausalLM(config))
    policy.temperature, policy.packing_samples = 0.7, False
    g = torch.Generator().manual_seed(1)
    sequences, attention = (
        torch.randint(0, 515, (3, 30), generator=g),
        torch.ones(3, 30, dtype=torch.long),
    )
    attention[0, :5] = 0
    mask = (torch.arange(12) < torch.tensor([[12], [7], [9]])).float()
    real = builtins.__import__

    def without_flash(name, *args, **kwargs):
        if name.startswith("flash_attn"):
            raise ImportError(name)  # OpenRLHF then takes its own path
        return real(name, *args, **kwargs)

    def forward():
        policy.model.zero_grad()
        logps, out = policy(
            sequences, mask, attention_mask=attention, return_output=True, return_entropy=True
        )
        entropy = out.entropy[:, -12:] * mask
        (logps.sum() + 0.1 * entropy.sum()).backward()
        return (
            logps.detach(),
            entropy.detach(),
            torch.cat([p.grad.flatten() for p in policy.model.parameters()]),
        )

    with pytest.MonkeyPatch.context() as context:
        context.setattr(builtins, "__import__", without_flash)
        stock = forward()
        with integration.patch() as patch:
            ours = forward()
        assert patch.fused_calls == {"token_logps": 1, "token_stats": 1}
        assert torch.equal(forward()[0], stock[0])
    for a, b in zip(stock, ours, strict=True):
        assert a.norm() > 1e-3 and (a - b).norm() <= 1e-6 * a.norm()


def test_the_actors_trainer_builds_our_loss(rlhf, integration):
    """``ActorPPOTrainer`` calls ``PolicyLoss(...)`` with its options; those that would
    have no effect are errors.
    """
    ppo_actor = rlhf[2]
    theirs = ppo_actor.PolicyLoss
    options = {
        "clip_eps_low": 0.2, "clip_eps_high": 0.2, "dual_clip": None, "token_level_loss": True, "policy_loss_type": "ppo", "is_correction_level": "off",
        "is_correction_mode": "mask", "is_correction_gating": "ratio", "is_correction_threshold": [0.5, 5.0],
    }  # fmt: skip
    assert "PolicyLoss(" in inspect.getsource(ppo_actor.ActorPPOTrainer.__init__)
    with integration.patch(spec="dapo", ppo_actor=ppo_actor):
        assert isinstance(ppo_actor.PolicyLoss(**options), integration.PolicyLoss)
        with pytest.raises(rw.InvalidCall, match=r"clip_eps_high=0\.28 would have no effect"):
            ppo_actor.PolicyLoss(**options | {"clip_eps_high": 0.28})
        with pytest.raises(
            rw.InvalidCall, match="is_correction_level='token' would have no effect"
        ):
            ppo_actor.PolicyLoss(**options | {"is_correction_level": "token"})
        with pytest.raises(rw.InvalidCall, match="set actor.loss_agg_mode=token-mean"):
            ppo_actor.PolicyLoss(**options | {"token_level_loss": False})
    corrected = rw.methods.dapo().with_weight(rw.weights.TruncatedImportance(ratio_max=2.0))
    # whose log-probs OpenRLHF asks for by this switch only
    with integration.patch(spec=corrected, ppo_actor=ppo_actor):
        assert isinstance(
            ppo_actor.PolicyLoss(**options | {"is_correction_level": "token"}),
            integration.PolicyLoss,
        )
        with pytest.raises(rw.InvalidCall, match="set algo.advantage.is_correction_level=token"):
            ppo_actor.PolicyLoss(**options)
        with pytest.raises(rw.InvalidCall, match="is_correction_mode='clip' would have no effect"):
            ppo_actor.PolicyLoss(
                **options | {"is_correction_level": "token", "is_correction_mode": "clip"}
            )
    assert ppo_actor.PolicyLoss is theirs


def test_the_example(rlhf, integration, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("openrlhf_setup")
    patches = []
    monkeypatch.setattr(
        example, "patch", lambda **options: patches.append(integration.patch(**options))
    )
    theirs = rlhf[2].PolicyLoss
    example.setup()
    assert rlhf[2].PolicyLoss is not theirs
    patches[0].undo()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (rw.methods.grpo(beta=0.1), "it has penalties, and OpenRLHF adds its own"),
        (rw.methods.dr_grpo(), "is neither a token mean nor a mean of the samples' token means"),
        (rw.methods.top_entropy(), "it reads entropy, which OpenRLHF does not pass to a loss"),
        (rw.methods.sft(), "does not read advantages"),
        (rw.methods.disco(kl_strength=0.0), "its reduction"),
        ("kl_cov", "it is of level batch, and a micro-batch is not the batch"),
    ],
)
def test_refusals(integration, spec, message):
    with pytest.raises(rw.UnsupportedRequest, match=message):
        integration.PolicyLoss(spec)


def test_options_that_belong_together(integration, batch):
    with pytest.raises(rw.InvalidCall, match="pass spec and ppo_actor"):
        integration.patch(spec="dapo")
    with pytest.raises(rw.InvalidCall, match="the count of tokens over all 2 ranks is missing"):
        run(integration.PolicyLoss("dapo"), batch, dp_size=2)
