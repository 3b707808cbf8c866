"""Which backend ``auto`` tries first, by device: what the committed measurements favour.

``bench/results/h200-kernels.json`` times both GPU backends on one H200. Where ``cuda`` keeps rows on chip, its one-pass kernel takes 0.80 to 0.94 of the
time that ``triton`` takes, its statistics 0.77 to 1.01, its gradient 0.92 to 1.03. Where it cannot, its one pass reads the logits twice and
takes 1.18 to 1.67 of the time. A test compares this table with that file.
"""

from __future__ import annotations

import functools

import torch

from .base import gpu_unsupported_reason

#: Best first; the reference serves what nobody else can. Devices without an entry have the reference alone.
ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "rows on chip": ("cuda", "triton", "reference"),
    "cuda": ("triton", "cuda", "reference"),
}

#: Hopper and data-center Blackwell: their shared memory and clusters hold rows of a real vocabulary.
_ROWS_ON_CHIP = (9, 10)


@functools.lru_cache(maxsize=64)
def kind_of(device: torch.device) -> str:
    """The entry of :data:`ORDER` for a device. Asks the driver once a device; a GPU that PyTorch does not see is of no special kind."""
    if device.type != "cuda" or torch.version.hip is not None or gpu_unsupported_reason(device) is not None:
        return device.type
    return "rows on chip" if torch.cuda.get_device_capability(device)[0] in _ROWS_ON_CHIP else "cuda"
