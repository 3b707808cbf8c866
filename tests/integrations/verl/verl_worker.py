"""One optimizer step of verl's FSDP engine on a CPU: a process of two, started by
test_verl_worker.py.

verl has no CPU platform; its registry takes the one below. The engine, its
micro-batches, its losses and its optimizer are verl's own; ray is a stand-in.
"""

import contextlib
import functools
import os
import sys

import torch
from trainers import on_path, stand_ins

MODEL, RESULTS, RANK, WORLD = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
os.environ |= {
    "VERL_PLATFORM": "cpu",
    "VERL_USE_EXTERNAL_PLUGINS": "none",
    "RANK": str(RANK),
    "WORLD_SIZE": str(WORLD),
}
on_path()
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{RESULTS}/store", rank=RANK, world_size=WORLD
)
with stand_ins("ray"):
    from verl.models.transformers import monkey_patch
    from verl.plugin.platform.platform_base import PlatformBase
    from verl.plugin.platform.platform_manager import PlatformRegistry

    @PlatformRegistry.register(platform="cpu")
    class Cpu(PlatformBase):
        device_name, vendor_name, device_module = "cpu", "cpu", torch.cpu

        def is_available(self):
            return True

        def current_device(self):
            return "cpu"

        def device_count(self):
            return 1

        def communication_backend_name(self):
            return "gloo"

        def get_device_capability(self, device_index=0):
            return None, None

    for name in set(PlatformBase.__abstractmethods__) - vars(Cpu).keys():
        setattr(Cpu, name, lambda self, *args: None)
    Cpu.__abstractmethods__ = frozenset()
    from verl.trainer.config import CheckpointConfig
    from verl.trainer.ppo import core_algos
    from verl.utils import tensordict_utils
    from verl.workers.config import (
        ActorConfig,
        FSDPEngineConfig,
        FSDPOptimizerConfig,
        HFModelConfig,
    )
    from verl.workers.config.actor import PolicyLossConfig
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
    from verl.workers.utils.losses import ppo_loss

    import reweight_ops as rw
    from reweight_ops.integrations import verl as integration

# it looks for a value head that this TRL has no longer
monkey_patch.is_trl_available = lambda: False
PROMPTS, RESPONSES = (3, 5, 2, 4, 3, 3, 2, 4), (6, 2, 5, 4, 1, 6, 3, 5)


def engine(fused):
    model = HFModelConfig(
        path=MODEL,
        load_tokenizer=False,
        use_remove_padding=False,
        enable_gradient_checkpointing=False,
        use_fused_kernels=fused,
        fused_kernel_options={"impl_backend": "torch"},
        override_config={"attn_implementation": "eager"},
    )
    precision = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    config = FSDPEngineConfig(strategy="fsdp2", mixed_precision=precision, use_torch_compile=False)
    made = FSDPEngineWithLMHead(
        model,
        config,
        FSDPOptimizerConfig(lr=1e-2, total_training_steps=10, clip_grad=1e9),
        CheckpointConfig(),
    )
    made.initialize()
    return made


def batch(fused):
    """This rank's half of eight samples, in micro-batches of two."""
    g = torch.Generator().manual_seed(5)
    samples = []
    for p, r in zip(PROMPTS, RESPONSES, strict=True):
        mask = (torch.rand(r, generator=g) > 0.2).long()
        mask[-1] = 1
        old, ids = (
            -4.2 + 0.4 * torch.randn(r, generator=g),
            torch.randint(64, (p + r,), generator=g),
        )
        fields = {
            "input_ids": ids,
            "position_ids": torch.arange(p + r),
            "prompts": ids[:p],
            "responses": ids[p:],
            "response_mask": mask,
        }
        samples.append(
            fields
            | {"loss_mask": mask, "old_log_probs": old, "advantages": torch.randn(r, generator=g)}
        )
    mine = samples[RANK::WORLD]
    tensors = {
        name: torch.nested.as_nested_tensor([s[name] for s in mine], layout=torch.jagged)
        for name in samples[0]
    }
    settings = {
        "use_remove_padding": False,
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": 2,
        "global_batch_size": 8,
    }
    settings |= {"temperature": 0.9, "calculate_entropy": True, "use_fused_kernels": fused}
    return tensordict_utils.get_tensordict(tensors, settings)


def step(loss_mode, fused=False, patch=None):
    """Gradients of a step, the loss, the names of its metrics, and what ran here."""
    made, gradients = engine(fused), {}
    optimizer_step = made.optimizer_step

    def recorded():
        gradients.update(
            {n: p.grad.full_tensor().clone() for n, p in made.module.named_parameters()}
        )
        return optimizer_step()

    made.optimizer_step = recorded
    actor = ActorConfig(
        strategy="fsdp2",
        ppo_micro_batch_size_per_gpu=2,
        rollout_n=1,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode),
        entropy_coeff=0.01,
    )
    with patch or contextlib.nullcontext(), made.train_mode():
        out = made.train_batch(batch(fused), functools.partial(ppo_loss, actor))
    moved = {n: p.full_tensor().detach() for n, p in made.module.named_parameters()}
    return {
        "gradients": gradients,
        "parameters": moved,
        "loss": sum(out["loss"]),
        "metrics": sorted(out["metrics"]),
        "counts": dict(patch.fused_calls) if patch else {},
    }


core_algos.register_policy_loss("rw_clip")(
    integration.loss_fn(rw.methods.verl("vanilla", clip_ratio=0.2))
)
integration.register({"rw_other": rw.methods.advantage_reweighting(alpha=0.3)})
found = {"stock": step("vanilla"), "loss": step("rw_clip"), "another loss": step("rw_other")}
# last: verl replaces the forward of the model's class
found["loss and head"] = step("rw_clip", True, integration.patch_fused_linear())
if RANK == 0:
    torch.save(found, f"{RESULTS}/found.pt")
torch.distributed.barrier()
