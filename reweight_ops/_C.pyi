"""The compiled extension: kernels on raw addresses, without any check. :mod:`reweight_ops.backends` validates every argument first."""

from collections.abc import Sequence
from typing import Any

class Program:
    """A loss by the names of its rules and weights; of a weight also whether its scope is "all". ValueError if one is not compiled in."""

    def __init__(self, terms: Sequence[str], weights: Sequence[tuple[str, bool]]) -> None: ...

class Call:
    """What all verbs share. ``strides``: rows per batch, batch and row stride in elements; ``vocab``: size, start, total."""

    def __init__(
        self,
        dtype: int,
        logits: int,
        strides: tuple[int, int, int],
        rows: int,
        columns: int,
        vocab: tuple[int, int, int],
        softcap: float,
        ids: int,
        temperature: int,
        temperature_per_row: bool,
        threads: int,
    ) -> None: ...

def build_info() -> dict[str, Any]: ...
def level() -> str: ...
def set_level(name: str) -> None: ...
def rules() -> dict[str, int]: ...
def weights() -> dict[str, int]: ...
def token_stats(call: Call, out: Sequence[int]) -> None: ...
def token_grad(call: Call, stats: Sequence[int], coefs: Sequence[int], out: int, out_strides: tuple[int, int, int]) -> None: ...
def token_loss_grad(
    call: Call,
    program: Program,
    params: int,
    reads_p_sq: bool,
    row_weights: int,
    row_weights_step: int,
    inputs: Sequence[int],
    rows: int,
    out: int,
    out_strides: tuple[int, int, int],
) -> None: ...
def divergence_stats(call: Call, other: Call, table: int) -> int: ...
def divergence_grad(call: Call, other: Call, table: int, coefs: int, out: int, out_strides: tuple[int, int, int]) -> int: ...
def divergence_loss_grad(
    call: Call, other: Call, table: int, constants: int, weights: int, out: int, out_strides: tuple[int, int, int]
) -> int: ...
def apply_rule(name: str, leaves: int, params: int, out: int, n: int) -> None: ...
def apply_weight(name: str, leaves: int, params: int, out: int, n: int) -> None: ...
def stream(kind: str, a: int, b: int, floats: int, threads: int) -> None: ...
