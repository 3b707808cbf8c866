"""Arguments of a wrong kind, on another device, or with a number that cannot be meant:
an error that names the argument, never one from inside PyTorch, and never a number.
"""

import subprocess
import sys

import pytest
import torch

import reweight_ops as rw

IDS, OLD = torch.ones(4, 3, dtype=torch.long), torch.full((4, 3), -2.0)
Z, HIDDEN, HEAD = torch.zeros(4, 3, 7), torch.ones(4, 3, 5), torch.ones(7, 5)
COMPLEX, ELSEWHERE = torch.ones(4, 3) * 1j, torch.ones(4, 3, device="meta")
REWARDS, GROUPS = torch.arange(8.0), torch.tensor([0, 1] * 4)


def policy(spec="dapo", **options):
    return rw.policy_loss(Z, IDS, **{"advantages": 1.0, **options}, spec=spec)


def from_logps(**options):
    spec = rw.methods.trl("dapo", entropy_coef=0.1)
    return rw.policy_loss_from_logps(OLD, 1.0, spec=spec, **{"entropies": -OLD, **options})


def linear(**options):
    return rw.linear_token_logps(**{"hidden": HIDDEN, "lm_head_weight": HEAD, **options})


def otb(op="otb", **options):
    given = {"completion_mask": torch.ones(8, 3), "old_per_token_logps": torch.zeros(8, 3)}
    given |= {"rewards": REWARDS, "log_sum_p_sq": torch.zeros(8, 3), **options}
    return getattr(rw.advantages, op)(**given, group_size=2)


CASES = {
    "complex advantages": (lambda: policy(advantages=COMPLEX), "advantages is torch.complex64"),
    "complex weights": (lambda: policy(token_weights=COMPLEX), "token_weights is torch.complex64"),
    "complex temperature": (lambda: policy(temperature=COMPLEX + 1), "temperature is torch.compl"),
    "complex rewards": (
        lambda: rw.advantages.grpo(REWARDS * 1j, group_size=2),
        "rewards is torch.complex64, expected real",
    ),
    "a mask elsewhere": (
        lambda: policy(completion_mask=ELSEWHERE),
        "completion_mask is .* on meta",
    ),
    "a log-prob above 0": (
        lambda: policy(old_per_token_logps=0.5),
        r"old_per_token_logps is 0.5, expected a number in \[-inf, 0\]",
    ),
    "an infinite advantage": (
        lambda: policy(advantages=float("inf")),
        r"advantages is inf, expected a number in \(-inf, inf\)",
    ),
    "an infinite weight": (lambda: policy(token_weights=-float("inf")), "token_weights is -inf"),
    "a negative ratio": (
        lambda: policy(importance_sampling_ratio=-1.5),
        r"importance_sampling_ratio is -1.5, expected a number in \[0, inf\)",
    ),
    "validate": (
        lambda: policy(validate=torch.ones(2)),
        "validate is tensor.*expected True or Fal",
    ),
    "entropies": (lambda: from_logps(entropies="x"), "entropies is a str, expected a tensor"),
    "whole entropies": (lambda: from_logps(entropies=IDS), "entropies is torch.int64"),
    "entropies elsewhere": (lambda: from_logps(entropies=ELSEWHERE), "entropies is on meta"),
    "hidden": (lambda: linear(hidden=torch.tensor(1.0), completion_ids=IDS), "hidden has shape"),
    "a bias": (lambda: linear(completion_ids=IDS, lm_head_bias=2.0), "lm_head_bias is a float"),
    "a lora": (lambda: linear(completion_ids=IDS, lora=0.5), "lora is a float, expected a Lora"),
    "a lora's factor": (
        lambda: linear(completion_ids=IDS, lora=rw.Lora(HEAD, 1.0)),
        "lora.b is a float, expected a tensor",
    ),
    "stats": (lambda: rw.token_stats(Z, IDS, stats=True), "stats is True; expected some of"),
    "ids of log-probs": (
        lambda: rw.preference_loss_from_logps(
            OLD, spec="dpo", ref_per_token_logps=OLD, completion_ids=IDS
        ),
        "completion_ids would have no effect",
    ),
    "groups elsewhere": (
        lambda: rw.advantages.grpo(REWARDS, group_ids=GROUPS.to("meta"), num_groups=2),
        "group_ids is on meta, other tensors on cpu",
    ),
    "lengths elsewhere": (
        lambda: rw.advantages.opo(REWARDS, REWARDS.to("meta"), group_size=2),
        "lengths is on meta, other tensors on cpu",
    ),
    "labels": (
        lambda: rw.sample_weights.class_balanced([0, 1], torch.ones(2)),
        "labels must be an int32 or int64 tensor",
    ),
    "a mask of otb": (lambda: otb(completion_mask="x"), "completion_mask is a str"),
    "rewards of otb": (lambda: otb("tir_otb", rewards=REWARDS[:7]), r"rewards has shape \(7,\)"),
    "entropies of aldr": (
        lambda: rw.divergences.aldr([1.0], 7, lambda0=1.0, alpha=1.0),
        "entropies is a list",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_error_names_the_argument(name):
    call, message = CASES[name]
    with pytest.raises(rw.InvalidCall, match=message):
        call()


def test_a_warm_call_refuses_the_same_numbers():
    """What a repeated call skips is not the check of its numbers."""
    z = Z.clone().requires_grad_()
    given = {"old_per_token_logps": -1.0, "advantages": 1.0, "importance_sampling_ratio": 1.0}
    for _ in range(3):
        rw.policy_loss(z, IDS, **given, spec="dapo")
    for name, wrong in (
        ("old_per_token_logps", 0.5),
        ("advantages", float("inf")),
        ("importance_sampling_ratio", -1.0),
    ):
        with pytest.raises(rw.InvalidCall, match=f"{name} is {wrong}, expected"):
            rw.policy_loss(z, IDS, **{**given, name: wrong}, spec="dapo")
    stored = rw.policy_loss(z, IDS, **{**given, "old_per_token_logps": -float("inf")}, spec="dapo")
    assert stored.ratio.isfinite().all()  # a probability of 0, and the ratio's clamp


def test_masks_of_any_dtype():
    advantages = otb(completion_mask=torch.ones(8, 3).half())
    assert torch.equal(advantages, otb()) and advantages.any()


def test_a_checkout_without_its_kernels():
    """Triton's kernels lie beside the package: a checkout that only the path names has
    none.
    """
    script = (
        "import sys; sys.modules['reweight_ops.triton_kernels'] = None\n"
        "import torch, reweight_ops as rw\n"
        "try: rw.token_logps(torch.zeros(2, 7), torch.zeros(2, dtype=torch.long), backend='triton')\n"
        "except rw.BackendUnavailable as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert "not part of this installation" in done.stdout, done
    assert "pip install -e ." in done.stdout, done
