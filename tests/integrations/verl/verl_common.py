"""verl's own modules for the tests, and a batch on which its losses differ."""

import torch
from trainers import trainer

core_algos, worker_config, actor_config, torch_functional, monkey_patch, worker_losses = trainer(
    "verl",
    "verl.trainer.ppo.core_algos",
    "verl.workers.config",
    "verl.workers.config.actor",
    "verl.utils.experimental.torch_functional",
    "verl.models.transformers.monkey_patch",
    "verl.workers.utils.losses",
    missing=("ray",),
)

TensorDict = worker_losses.TensorDict
policy_config = actor_config.PolicyLossConfig

#: What ppo_loss puts into the configuration: nothing, or the counts of a global batch
#: on two ranks.
LOCAL, GLOBAL = (
    {},
    {"dp_size": 2, "batch_num_tokens": 77, "global_batch_size": 11, "loss_scale_factor": 32},
)


def config(info=LOCAL, **fields):
    made = worker_config.ActorConfig(
        strategy="fsdp", ppo_micro_batch_size_per_gpu=1, rollout_n=1, **fields
    )
    made.global_batch_info.update(info)
    return made


def batch(per_sequence=False):
    """``[6, 10]``: ratios on both sides of the bounds, one empty sequence, per-token
    advantages unless of a sequence.
    """
    g = torch.Generator().manual_seed(5)
    shape = (6, 10)
    old = -3 * torch.rand(shape, generator=g)
    lengths = torch.tensor([10, 0, 4, 7, 2, 10])
    return {
        "old_log_prob": old,
        "log_prob": (old + 0.5 * torch.randn(shape, generator=g)).clamp(max=-1e-3).requires_grad_(),
        "advantages": torch.randn((6, 1), generator=g).expand(shape)
        if per_sequence
        else torch.randn(shape, generator=g),
        "response_mask": torch.arange(10) < lengths[:, None],
        "rollout_is_weights": torch.rand(shape, generator=g) + 0.5,
    }


def run(function, batch, info=LOCAL, weighted=True, agg="token-mean", **fields):
    """Loss, gradient by the log-probs and metrics of one registered loss."""
    inputs = batch if weighted else batch | {"rollout_is_weights": None}
    loss, metrics = function(**inputs, loss_agg_mode=agg, config=config(info, **fields))
    (grad,) = torch.autograd.grad(loss, batch["log_prob"])
    return loss.detach(), grad, metrics


def assert_same(theirs, ours):
    assert theirs[1].norm() > 1e-3
    assert (theirs[1] - ours[1]).norm() <= 1e-6 * theirs[1].norm()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
