"""Run by torchrun in two processes: the advantages of recipes over a group that both
hold, and two training steps. Prints a line for each recipe.
"""

import os
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parents[1] / "support")]

from trl_common import make_trainer  # noqa: E402

import reweight_ops as rw  # noqa: E402
from reweight_ops.integrations.trl import ReweightGRPOTrainer  # noqa: E402

#: Each with its advantages from the completions of both processes.
EXPECTED = {
    "hapo": lambda v: rw.advantages.hapo(v["rewards"], v["lengths"], group_size=8),
    "lens": lambda v: rw.advantages.lens(v["correct"], v["old"], v["mask"], group_size=8),
    "reinforce_plus_plus_baseline": lambda v: rw.advantages.reinforce_plus_plus_baseline(
        v["rewards"], v["mask"], group_size=8
    ),
}


def correct(completions, **_):
    return [float(len(completion) % 2) for completion in completions]


class Ragged(ReweightGRPOTrainer):
    """Completions of other lengths in each process."""

    def _generate(self, prompts):
        found = list(super()._generate(prompts))
        found[1] = [
            ids[: 3 + 2 * self.accelerator.process_index + i % 4] for i, ids in enumerate(found[1])
        ]
        return tuple(found)


def main(out):
    for name, advantages in EXPECTED.items():
        trainer = make_trainer(
            str(Path(out, os.environ["RANK"])),
            Ragged,
            ours={"recipe": name, "reward_funcs": correct},
            per_device_train_batch_size=4,
            num_generations=8,
            max_steps=2,
        )
        accelerator = trainer.accelerator
        inputs = trainer._generate_and_score_completions(
            [dict(trainer.train_dataset[0]) for _ in range(4)]
        )

        def everywhere(x, accelerator=accelerator):
            return accelerator.gather(
                accelerator.pad_across_processes(x, dim=1) if x.dim() > 1 else x
            )

        mask = inputs["completion_mask"]
        rewards = trainer._reweight_hooks.rollout._rewards[:, 0]
        old = everywhere(inputs.get("old_per_token_logps", mask.float()))
        values = {
            "rewards": rewards,
            "correct": rewards,
            "lengths": everywhere(mask.sum(-1)),
            "mask": everywhere(mask),
            "old": old,
        }
        mine = advantages(values)[4 * accelerator.process_index :][:4]
        mine = mine if mine.dim() == 1 else mine[:, : mask.size(1)]
        torch.testing.assert_close(inputs["advantages"], mine, rtol=1e-5, atol=1e-5)
        widths = accelerator.gather(torch.tensor(mask.size(1)))
        assert widths[0] != widths[1], "both processes are as wide"
        trainer.train()
        assert trainer.delegated_calls == {}
        print(f"process {accelerator.process_index}: {name} agrees", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
