"""``python -m conformance [PEER ...]``: the table of the peers that are installed (or
whose names begin so). Exit code 1 if a difference is unexpected.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence

import torch
from paths import ROOT

sys.path.append(str(ROOT / "build" / "peers"))  # behind everything that is installed
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

from . import cce, liger, trl_losses, verl_losses
from .table import Case, lines, text

PEERS: tuple[tuple[str, Callable[[], Iterable[Case]]], ...] = (
    ("TRL loss", trl_losses.losses),
    ("TRL head", trl_losses.heads),
    ("verl", verl_losses.losses),
    ("Liger GRPO", liger.grpo),
    ("Liger kernel", liger.kernel),
    ("Liger pairs", liger.pairs),
    ("Liger JSD", liger.distillation),
    ("CCE", cce.losses),
)


def main(chosen: Sequence[str]) -> int:
    peers = [
        peer
        for peer in PEERS
        if not chosen or any(peer[0].lower().startswith(name.lower()) for name in chosen)
    ]
    table = list(lines(peers))
    print(text(table))
    return int(not table or any(not line.expected for line in table))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
