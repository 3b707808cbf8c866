"""Every verb once, on small and awkward shapes, for compute-sanitizer to watch: ``compute-sanitizer --tool memcheck python tests/gpu/sanitize.py cuda``.

Tensors are made on the CPU, each in an allocation of its own size, so nearly every launch seen is one of ours and no access past an end is hidden.
"""

import os
import sys

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
if sys.argv[2:] == ["cpu"]:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

import reweight_ops as rw
from reweight_ops.backends.base import COEFS, OUT, STATS, Head, RowInputs
from reweight_ops.backends.select import load

SPEC = rw.methods.grpo(beta=0.04, entropy_coef=0.01).with_weight(rw.weights.AdvantageReweighting())
PROGRAM, PARAMS = SPEC.program, torch.tensor([float(v) for v in SPEC.parameter_values])


def one(backend: str, device: str, n: int, v: int, dtype: torch.dtype, head: Head, in_place: bool, shift: int = 0) -> None:
    verbs, g = load(backend), torch.Generator().manual_seed(v)
    z = (torch.randn(n, v + shift, generator=g) * 3).to(dtype).to(device)[:, shift:]
    ids = torch.randint(0, head.vocab_size, (n,), generator=g)
    ids[0] = OUT
    ids, one = ids.to(device), torch.ones(1).to(device)
    stats = verbs.token_stats(z, ids, one, head, STATS)
    rows = [torch.randn(n, generator=g).to(device) for _ in range(4)]
    out = z if in_place else torch.empty(n, v, dtype=dtype).to(device)
    verbs.token_grad(z, ids, one, head, dict(zip(STATS, (s.clone() for s in stats), strict=True)), dict.fromkeys(COEFS, rows[0]), out)
    inputs = RowInputs(torch.ones(3, n).to(device), rows[1], rows[0], rows[2])
    verbs.token_loss_grad(z, ids, one, head, inputs, PROGRAM, PARAMS.to(device), out)


def main() -> None:
    backend, device = sys.argv[1], (sys.argv[2:] or ["cuda"])[0]
    shapes = [(2, 1), (3, 131), (2, 4099), (2, 40001)] if device == "cuda" else [(2, 131)]
    for n, v in shapes:
        for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 3 if device == "cuda" else 2]:
            one(backend, device, n, v, dtype, Head(v), in_place=False)
            one(backend, device, n, v, dtype, Head(max(v - 3, 1), softcap=20.0), in_place=True, shift=1)
    if device == "cuda":
        torch.cuda.synchronize()
    print("every launch returned")


if __name__ == "__main__":
    main()
