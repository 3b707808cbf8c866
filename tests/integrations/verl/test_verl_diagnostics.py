"""Diagnostics of the sampler under verl's names are verl's own numbers, and those of
TRL's names are in TRL's source.
"""

import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch
from verl_common import core_algos

import reweight_ops as rw


@pytest.fixture
def out():
    g = torch.Generator().manual_seed(2)
    mask = torch.arange(7) < torch.tensor([7, 3, 5])[:, None]
    old = -2 * torch.rand(3, 7, generator=g, dtype=torch.float64)
    sampling = old + 0.3 * torch.randn(3, 7, generator=g, dtype=torch.float64)
    made = rw.policy_loss_from_logps(
        old.clone().requires_grad_(),
        torch.ones(3),
        spec=rw.methods.grpo().with_weight(rw.weights.TruncatedImportance()),
        old_per_token_logps=old,
        sampling_per_token_logps=sampling,
        completion_mask=mask,
    )
    return made, old, sampling, mask


def test_they_are_verls(out):
    made, old, sampling, mask = out
    helper = importlib.import_module(
        core_algos.__name__.replace("core_algos", "rollout_corr_helper")
    )
    theirs = helper.compute_offpolicy_metrics(old, sampling, mask.double())
    ratio = (old - sampling).exp()
    theirs |= helper.compute_is_metrics(
        ratio, ratio, old - sampling, mask.double(), rollout_is="token", rollout_is_threshold=1e6
    )
    ours = made.diagnostics.as_floats("verl")
    shared = [
        name.removeprefix("rollout_corr/") for name in ours if name.startswith("rollout_corr/")
    ]
    assert set(shared) == {
        "kl",
        "k3_kl",
        *(f"rollout_is_{x}" for x in ("eff_sample_size", "min", "mean", "max")),
    }
    for name in shared:
        assert ours[f"rollout_corr/{name}"] == pytest.approx(float(theirs[name]), rel=1e-6), name


def test_the_two_differences_of_probabilities_are_verls(out):
    """Of tokens that both know; verl's ``training/`` metrics."""
    made, old, sampling, mask = out
    debug = importlib.import_module("verl.utils.debug.metrics")
    batch = {
        "rollout_log_probs": sampling,
        "old_log_probs": old,
        "response_mask": mask,
        "responses": torch.zeros(3, 7),
    }
    theirs = debug.calculate_debug_metrics(SimpleNamespace(batch=batch))
    ours = made.diagnostics.as_floats("verl")
    names = [name for name in ours if name.startswith("training/")]
    assert names == ["training/rollout_probs_diff_mean", "training/rollout_probs_diff_max"]
    for name in names:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-12), name


def test_names_of_trl_are_in_its_source(out):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    source = inspect.getsource(trainer)
    names = [
        n
        for n in out[0].diagnostics
        if n.startswith(("sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"))
    ]
    assert len(names) == 5 and all(f'"{name}"' in source for name in names)
    pairs = inspect.getsource(importlib.import_module("trl.trainer.dpo_trainer"))
    logps = torch.tensor([[-1.0], [-2.0]])
    made = rw.preference_loss_from_logps(
        logps, spec=rw.preference.dpo(), ref_per_token_logps=logps - 0.5
    )
    found = [name for name in made.metrics if name.startswith("rewards/")]
    assert "rewards/accuracies" in found and all(f'"{name}"' in pairs for name in found)
