"""The CPU cost of a warm call outside of its kernel, for this tree and others in turns.

``python -m bench.host [TREE ...]`` times small tensors, forward and backward. Each tree
(a checkout with its extension built) and this one run in turns in separate processes,
``ROUNDS`` times each, and so does eager PyTorch's loss. The result is the minimum of
many short runs in the thread's own processor time, so that other processes matter as
little as possible.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 5
CASES = ("one_pass", "two_pass", "eager")

MEASURE = """
import sys, time, torch
import reweight_ops as rw
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
z = torch.randn(4, 32, 64, generator=g).requires_grad_()
ids, adv = torch.randint(0, 64, (4, 32), generator=g), torch.randn(4, generator=g)
old, mask = torch.randn(4, 32, generator=g) * 0.1 - 4, torch.ones(4, 32, dtype=torch.long)
spec = rw.methods.dapo()

def loss():
    return rw.policy_loss(
        z, ids, adv, spec=spec, old_per_token_logps=old, completion_mask=mask, plan=sys.argv[1]
    ).loss

def eager():
    ratio = (torch.log_softmax(z, -1).gather(-1, ids[..., None])[..., 0] - old).exp()
    terms = -torch.minimum(ratio * adv[:, None], ratio.clamp(0.8, 1.28) * adv[:, None])
    return (terms * mask).sum() / mask.sum().clamp(min=1)

call = eager if sys.argv[1] == "eager" else loss
least = 1e9
for _ in range(100):
    start = time.thread_time()
    for _ in range(50):
        call().backward()
        z.grad = None
    least = min(least, (time.thread_time() - start) / 50)
print(least * 1e6)
"""


def once(tree: Path, case: str) -> float:
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    return float(
        subprocess.run(
            [sys.executable, "-c", MEASURE, case],
            cwd=tree,
            env=env,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trees", nargs="*", type=Path)
    trees = [*parser.parse_args().trees, ROOT]
    found: dict[tuple[Path, str], list[float]] = {
        (tree, case): [] for tree in trees for case in CASES
    }
    for _ in range(ROUNDS):
        for (tree, case), times in found.items():
            times.append(once(tree, case))
    print(
        "us per call, 4x32x64 fp32, forward and backward, one thread; median (least) of "
        f"{ROUNDS} processes"
    )
    for (tree, case), times in found.items():
        print(f"{tree.name:16s} {case:9s} {statistics.median(times):7.1f} ({min(times):.1f})")


if __name__ == "__main__":
    main()
