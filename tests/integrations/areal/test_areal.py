"""AReaL's log-probs and its PPO loss by our ops, against a transcription of its own.
CPU.
"""

import importlib
import math

import areal_oracle as oracle
import pytest
import torch
from areal_oracle import RejectionSamplingConfig
from paths import ROOT

import reweight_ops as rw
from reweight_ops.rules.surrogates import Clip, DualClip

V = 41
LENGTHS = (9, 5, 12)


@pytest.fixture(scope="module")
def areal():
    with pytest.MonkeyPatch.context() as patch:
        oracle.install(patch)
        from reweight_ops.integrations import areal

        yield areal


def drawn():
    return torch.Generator().manual_seed(37)


def streams(packed):
    """Log-probs and data of three sequences: ``[T]`` with ``cu_seqlens``, or
    ``[3, 12]``; one advantage a sequence.
    """
    g = drawn()
    shape = (sum(LENGTHS),) if packed else (3, 12)
    old = -3 * torch.rand(shape, generator=g)
    near = lambda scale: (old + scale * torch.randn(shape, generator=g)).clamp(max=-1e-3)  # noqa: E731
    advantages = torch.tensor([1.2, -0.7, 0.9])
    mask = torch.rand(shape, generator=g) > 0.25
    if packed:
        data = {
            "cu_seqlens": torch.tensor([0, 9, 14, 26], dtype=torch.int32),
            "advantages": advantages.repeat_interleave(torch.tensor(LENGTHS)),
        }
    else:
        data = {"advantages": advantages[:, None].expand(shape)}
        mask &= torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    logprobs = near(0.5).requires_grad_()
    return logprobs, data | {"logprobs": old, "prox_logp": near(0.3), "loss_mask": mask.float()}


def run(logprobs, data, **options):
    loss, stat = oracle.grpo_loss_fn(logprobs, data, **options)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0], stat


def assert_same(theirs, ours):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-7)
    assert theirs[1].norm() > 1e-3 and (theirs[1] - ours[1]).norm() <= 1e-6 * theirs[1].norm()


SPECS = {
    "ppo": (rw.methods.ppo(), {}),
    "asymmetric": (rw.methods.dapo(epsilon_high=0.6), {"eps_clip_higher": 0.6}),
    "dual clip": (
        rw.PolicyLossSpec(surrogate=DualClip(clip_ratio_c=1.1), name="dual"),
        {"c_clip": 1.1},
    ),
    "sequence": (
        rw.PolicyLossSpec(
            surrogate=Clip(), ratio=rw.SequenceRatio(clamp=math.inf), name="sequence"
        ),
        {"level": "sequence"},
    ),
}
SAMPLING = {
    "none": None,
    "mask": RejectionSamplingConfig(upper=1.3),
    "both sides": RejectionSamplingConfig(upper=1.3, lower=0.8),
    "clamp": RejectionSamplingConfig(action="clamp", upper=1.1),
    "sequence": RejectionSamplingConfig(level="sequence", upper=1.2, lower=0.95),
}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("name", SPECS)
def test_their_loss(areal, name, sampling, packed):
    """The spec that says what AReaL's options say, under AReaL's ``grpo_loss_fn``;
    rejection sampling is AReaL's in both.
    """
    spec, options = SPECS[name]
    logprobs, data = streams(packed)
    theirs = run(logprobs, data, rejection_sampling=SAMPLING[sampling], **options)
    with areal.patch_loss(spec, actor=oracle.actor) as patch:
        ours = run(logprobs, data, rejection_sampling=SAMPLING[sampling])
        assert patch.fused_calls == {"policy_loss_from_logps": 1}
    assert_same(theirs, ours)
    inside = data["loss_mask"].bool() if sampling == "none" else theirs[2]["behave_mask"]
    # where AReaL has no loss of masked tokens to log
    names = ("loss", "importance_weight") if name != "sequence" else ("importance_weight",)
    for stat in names:
        torch.testing.assert_close(
            torch.where(inside, ours[2][stat], 0),
            torch.where(inside, theirs[2][stat], 0),
            rtol=1e-5,
            atol=1e-6,
        )
    if name == "ppo":
        assert torch.equal(ours[2]["clip_mask"], theirs[2]["clip_mask"])
    assert ours[2].keys() == theirs[2].keys()


def test_the_streams_meet_the_branches(areal):
    logprobs, data = streams(True)
    found = [
        run(logprobs, data, rejection_sampling=s, **options)[1]
        for _, options in SPECS.values()
        for s in SAMPLING.values()
    ]
    assert all((a - b).norm() > 1e-3 * a.norm() for i, a in enumerate(found) for b in found[:i])


def test_decoupled_ppo_by_its_own_weight(areal):
    """The catalogue's method against AReaL's loss with the weight that rejection
    sampling clamps.
    """
    logprobs, data = streams(True)
    theirs = run(
        logprobs, data, rejection_sampling=RejectionSamplingConfig(action="clamp", upper=1.1)
    )
    with areal.patch_loss(rw.methods.decoupled_ppo(ratio_max=1.1), actor=oracle.actor):
        assert_same(theirs, run(logprobs, data))


def test_numbers_of_masked_tokens_do_not_matter(areal):
    logprobs, data = streams(True)
    with areal.patch_loss("ppo", actor=oracle.actor):
        clean = run(logprobs, data)
        spoiled = torch.where(data["loss_mask"] == 0, torch.nan, data["prox_logp"])
        dirty = run(logprobs, data | {"prox_logp": spoiled})
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


@pytest.mark.parametrize(
    ("spec", "options", "error", "message"),
    [
        ("grpo", {}, rw.UnsupportedRequest, "its reduction is not a token mean"),
        ("kl_cov", {}, rw.UnsupportedRequest, "level batch"),
        ("sft", {}, rw.UnsupportedRequest, "does not read advantages"),
        (rw.methods.dapo(entropy_coef=0.1), {}, rw.UnsupportedRequest, "it reads entropy"),
        (
            "dapo",
            {"eps_clip": 0.1, "c_clip": 3.0},
            rw.InvalidCall,
            "actor.eps_clip=0.1, actor.c_clip=3.0 would have no effect",
        ),
        ("dapo", {"level": "sequence"}, rw.InvalidCall, "importance_sampling_level='sequence'"),
        ("dapo", {"use_sapo_loss": True}, rw.InvalidCall, "use_sapo_loss=True bypasses"),
        (
            "decoupled_ppo",
            {"rejection_sampling": RejectionSamplingConfig()},
            rw.InvalidCall,
            "would do it twice",
        ),
    ],
)
def test_refusals(areal, spec, options, error, message):
    with pytest.raises(error, match=message), areal.patch_loss(spec, actor=oracle.actor):
        run(*streams(True), **options)


# --- log-probs ------------------------------------------------------------------------
def through_the_engine():
    g = drawn()
    logits = torch.randn(26, V, generator=g).requires_grad_()
    ids = torch.randint(V, (1, 26), generator=g)
    logps, entropy = oracle.compute_logprobs_and_entropy(logits, ids, 0.7)
    share = torch.linspace(-1, 1, 26)
    (grad,) = torch.autograd.grad(
        (logps * share).sum() + 0.3 * (entropy * share.flip(0)).sum(), logits
    )
    return logps.detach(), entropy.detach(), grad


def test_log_probs_and_entropies(areal):
    stock = through_the_engine()
    with areal.patch_logprobs(oracle.fsdp_engine) as patch:
        ours = through_the_engine()
        only = oracle.fsdp_engine.gather_logprobs(
            torch.zeros(3, V), torch.zeros(3, dtype=torch.int32)
        )
        assert patch.fused_calls == {"token_logps": 2} and not patch.delegated_calls
    for a, b in zip(stock, ours, strict=True):
        assert a.norm() > 1e-3 and (a - b).norm() <= 1e-6 * a.norm()
    torch.testing.assert_close(only, torch.full((3,), -math.log(V)))
    assert oracle.fsdp_engine.gather_logprobs is oracle.gather_logprobs


def test_tensor_parallel_calls_are_left_to_areal(areal, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    with (
        areal.patch_logprobs(oracle.fsdp_engine) as patch,
        pytest.warns(UserWarning, match="leaves this to AReaL: tensor parallelism"),
    ):
        oracle.fsdp_engine.gather_logprobs(
            torch.zeros(3, V), torch.zeros(3, dtype=torch.int64), tp_group="a group"
        )
    assert not patch.fused_calls and sum(patch.delegated_calls.values()) == 1


def test_what_is_not_areals(areal, monkeypatch):
    with pytest.raises(rw.InvalidCall, match="pass the engine modules"):
        areal.patch_logprobs()
    monkeypatch.setattr(oracle.fsdp_engine, "gather_logprobs", lambda logits: None)
    with pytest.raises(rw.BackendUnavailable, match="gather_logprobs has the signature"):
        areal.patch_logprobs(oracle.fsdp_engine)


def test_the_example(areal, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("areal_setup")
    patches = example.setup()
    try:
        through_the_engine()
        assert run(*streams(True))[1].norm() > 1e-3
        assert [sum(p.fused_calls.values()) for p in patches] == [1, 1]
    finally:
        for patch in patches:
            patch.undo()
