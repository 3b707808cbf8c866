"""Which backend ``auto`` tries first on each device, from the committed measurements.

``bench/results/h200-kernels.json`` times both GPU backends on one H200. Where ``cuda``
keeps rows on chip, its one-pass kernel takes 0.80 to 0.94 of the time of ``triton``,
its statistics 0.77 to 1.01, and its gradient 0.92 to 1.03. Where it cannot, its one
pass reads the logits twice and takes 1.18 to 1.67 of the time. A test compares this
table with that file.
"""

from __future__ import annotations

import functools

import torch

from .base import gpu_unsupported_reason

#: The best backend comes first. The reference serves the calls that no other can. A
#: device without an entry has only the reference.
ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "rows on chip": ("cuda", "triton", "reference"),
    "cuda": ("triton", "cuda", "reference"),
}

#: Hopper and data-center Blackwell. Their shared memory and clusters hold rows of a
#: real vocabulary.
_ROWS_ON_CHIP = (9, 10)


@functools.lru_cache(maxsize=64)
def kind_of(device: torch.device) -> str:
    """Return the entry of :data:`ORDER` for a device.

    It asks the driver once per device. A GPU that PyTorch does not see has no special
    entry.
    """
    if (
        device.type != "cuda"
        or torch.version.hip is not None
        or gpu_unsupported_reason(device) is not None
    ):
        return device.type
    return (
        "rows on chip" if torch.cuda.get_device_capability(device)[0] in _ROWS_ON_CHIP else "cuda"
    )
