"""The oracles compared with each other where two sources state the same loss, and with
finite differences.
"""

import pytest
import torch
from oracles import papers, trl, verl


@pytest.fixture
def batch():
    """A ragged fp64 batch in which clipping is active on both sides."""
    g = torch.Generator().manual_seed(3)
    B, T, V = 6, 9, 7
    logits = (2 * torch.randn(B, T, V, generator=g, dtype=torch.float64)).requires_grad_()
    ids = torch.randint(V, (B, T), generator=g)
    logp, entropy = trl.logps_and_entropies(logits, ids)
    mask = torch.arange(T) < torch.tensor([9, 1, 4, 7, 2, 9])[:, None]
    old, ref = (
        logp.detach() + s * torch.randn(B, T, generator=g, dtype=torch.float64) for s in (0.4, 0.3)
    )
    A = torch.randn(B, generator=g, dtype=torch.float64)
    return {
        "logits": logits,
        "ids": ids,
        "logp": logp,
        "H": entropy,
        "old": old,
        "ref": ref,
        "A": A,
        "A2": torch.randn(B, T, generator=g, dtype=torch.float64),
        "mask": mask,
    }


def same(a, b, x):
    """Values and gradients by ``x`` agree to fp64 rounding."""
    (ga,), (gb,) = (torch.autograd.grad(loss, x, retain_graph=True) for loss in (a, b))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ga, gb, rtol=1e-11, atol=1e-14)
    assert ga.abs().sum() > 1e-3


def test_the_batch_clips_on_both_sides(batch):
    _, metrics = trl.grpo_loss(
        batch["logp"], batch["A"], batch["mask"], old_logps=batch["old"], num_items_in_batch=1
    )
    assert metrics["clip_ratio/low_mean"] > 0.02 and metrics["clip_ratio/high_mean"] > 0.02


@pytest.mark.parametrize("name", ["ppo_clip", "grpo", "dapo", "dr_grpo", "gspo", "cispo", "sapo"])
def test_paper_equals_trl(batch, name):
    logp, old, ref, A, mask = (batch[k] for k in ("logp", "old", "ref", "A", "mask"))
    n = int(mask.sum())
    paper, ours = {
        "ppo_clip": (papers.ppo_clip(logp, old, A, mask), {"loss_type": "bnpo"}),
        "grpo": (
            papers.grpo(logp, old, ref, A, mask),
            {"loss_type": "grpo", "beta": 0.04, "ref_logps": ref, "use_bias_correction_kl": False},
        ),
        "dapo": (
            papers.dapo(logp, old, A, mask),
            {"loss_type": "dapo", "epsilon_high": 0.28, "num_items_in_batch": n},
        ),
        "dr_grpo": (
            papers.dr_grpo(logp, old, A, mask, horizon=50),
            {"loss_type": "dr_grpo", "max_completion_length": 50},
        ),
        "gspo": (
            papers.gspo(logp, old, A, mask, 0.1, 0.2),
            {
                "loss_type": "grpo",
                "importance_sampling_level": "sequence",
                "epsilon": 0.1,
                "epsilon_high": 0.2,
            },
        ),
        "cispo": (
            papers.cispo(logp, old, A, mask, 1.0, 0.3),
            {"loss_type": "cispo", "epsilon_high": 1.3, "num_items_in_batch": n},
        ),
        "sapo": (papers.sapo(logp, old, A, mask), {"loss_type": "sapo"}),
    }[name]
    same(paper, trl.grpo_loss(logp, A, mask, old_logps=old, **ours)[0], batch["logits"])


@pytest.mark.parametrize(
    "name", ["ppo_clip", "dapo", "dr_grpo", "gspo_token", "cispo", "sapo", "gpg"]
)
def test_paper_equals_verl(batch, name):
    logp, old, A2, mask = (batch[k] for k in ("logp", "old", "A2", "mask"))
    off = 1e9  # no dual clip
    paper, mode, args = {
        "ppo_clip": (papers.ppo_clip(logp, old, A2, mask), "vanilla", {"clip_ratio_c": off}),
        "dapo": (
            papers.dapo(logp, old, A2, mask),
            "vanilla",
            {"clip_ratio_c": off, "clip_ratio_high": 0.28},
        ),
        "dr_grpo": (
            papers.dr_grpo(logp, old, A2, mask, horizon=9),
            "vanilla",
            {"clip_ratio_c": off, "loss_agg_mode": "seq-mean-token-sum-norm"},
        ),
        "gspo_token": (
            papers.gspo_token(logp, old, A2, mask, 0.1, 0.2),
            "gspo",
            {"clip_ratio_low": 0.1, "clip_ratio_high": 0.2, "loss_agg_mode": "seq-mean-token-mean"},
        ),
        "cispo": (papers.cispo(logp, old, A2, mask, 0.2, 0.3), "cispo", {"clip_ratio_high": 0.3}),
        "sapo": (papers.sapo(logp, old, A2, mask), "sapo", {}),
        "gpg": (papers.gpg(logp, A2, mask), "gpg", {}),
    }[name]
    same(paper, verl.policy_loss(mode, logp, A2, mask, old_logps=old, **args)[0], batch["logits"])


def test_advantage_reweighting_of_certain_and_impossible_tokens():
    """p_old = 1 keeps the advantage; p_old -> 0 leaves 1 - alpha of it."""
    A = papers.advantage_reweighting(
        lambda a: a, torch.tensor([2.0, -4.0]), torch.tensor([[0.0, -100.0]] * 2), alpha=0.25
    )
    torch.testing.assert_close(A, torch.tensor([[2.0, 1.5], [-4.0, -3.0]]))


def test_lopti_passes_add_up_to_the_whole(batch):
    low, high = papers.lopti(batch["logp"] ** 2, batch["old"], batch["mask"])
    assert low > 0 and high > 0
    torch.testing.assert_close(low + high, (batch["logp"] ** 2)[batch["mask"]].mean())


def test_entropy_and_its_gradient(batch):
    logits = batch["logits"]
    torch.testing.assert_close(papers.entropy(logits), batch["H"])
    torch.autograd.gradcheck(papers.entropy, logits[:1, :3])
    (grad,) = torch.autograd.grad(papers.entropy(logits).sum(), logits)
    torch.testing.assert_close(papers.entropy_grad(logits), grad)
    (grad,) = torch.autograd.grad(batch["logp"].sum(), logits)
    torch.testing.assert_close(papers.logp_grad(logits, batch["ids"]), grad)


@pytest.mark.parametrize("kind", verl.KL_TYPES)
def test_kl_penalties(batch, kind):
    """The value is the paper's estimator; with ``+`` the gradient is that of k2."""
    logp, ref = batch["logp"], batch["ref"]
    value = {"k1": papers.k1, "abs": lambda a, b: (a - b).abs(), "k2": papers.k2}.get(
        kind.removesuffix("+"), papers.k3
    )
    got = verl.kl_penalty(logp, ref, kind)
    torch.testing.assert_close(got, value(logp, ref))
    by = papers.k2 if kind.endswith("+") else value
    torch.testing.assert_close(
        *(torch.autograd.grad(f.sum(), logp, retain_graph=True)[0] for f in (got, by(logp, ref)))
    )
