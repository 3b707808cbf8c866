"""What is measured: shapes, dtypes, and two jobs. ``loss``: a clipped policy loss and its gradient by the logits; ``logps``: log-probs alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reweight_ops import _C

ENTROPY_COEF = 0.01
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Case:
    job: str  # loss | logps
    rows: int
    vocab: int
    dtype: str
    entropy: bool = False  # the loss has an entropy bonus, with its gradient
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.job} {self.rows}x{self.vocab} {self.dtype}{' +entropy' if self.entropy else ''}"

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.vocab * ITEM[self.dtype]


SHAPES = ((256, 32000), (128, 151936), (512, 151936))


def cases(device: str = "cpu") -> list[Case]:
    """The whole set: fp32, bf16 and fp16, with and without the gradient of the entropy."""
    found = []
    for rows, vocab in SHAPES:
        for dtype in ITEM:
            found += [Case("loss", rows, vocab, dtype, entropy, device) for entropy in (False, True)]
            found.append(Case("logps", rows, vocab, dtype, False, device))
    return found


@dataclass
class Data:
    """One case's tensors. ``logits`` [B, T, V] is scratch: ``restore`` fills it again after somebody wrote over it, and leaves nothing of it
    in a cache (the code stays warm)."""

    case: Case
    logits: Tensor
    pristine: Tensor
    ids: Tensor
    advantages: Tensor
    old: Tensor

    def restore(self) -> None:
        self.logits.copy_(self.pristine)
        if not self.logits.is_cuda:  # a GPU's caches are small beside the copy
            for t in (self.logits, self.pristine):
                _C.stream("flush", t.data_ptr(), 0, t.numel() * t.element_size() // 4, torch.get_num_threads())


def make_data(case: Case) -> Data:
    g = torch.Generator().manual_seed(0)
    t = 64
    shape = (case.rows // t, t)
    ids = torch.randint(0, case.vocab, shape, generator=g)
    logits = torch.empty(*shape, case.vocab, dtype=getattr(torch, case.dtype))
    logp = torch.empty(shape)
    for b in range(shape[0]):  # by parts: the fp32 draft must not be most of this process's memory
        z = torch.randn(t, case.vocab, generator=g) * 3
        z.scatter_add_(-1, ids[b, :, None], torch.rand(t, 1, generator=g) * 12)  # targets from rare to nearly certain
        logits[b] = z
        logp[b] = torch.log_softmax(logits[b].float(), -1).gather(-1, ids[b, :, None])[:, 0]
    old = logp + 0.3 * torch.randn(shape, generator=g)
    advantages = torch.randn(shape, generator=g)
    on = [x.to(case.device) for x in (logits, logits.clone(), ids, advantages, old)]
    return Data(case, *on)
