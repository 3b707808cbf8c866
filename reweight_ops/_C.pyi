"""The compiled extension: kernels on raw addresses, without any check.
:mod:`reweight_ops._core.backends` validates every argument first.
"""

from collections.abc import Sequence
from typing import Any

operations: list[str]
max_registers: int
most_top: int
sources: str

class Table:
    """A loss program as a table of instructions, by the address of its words, the sizes
    of its parts, and the registers of what it gives.
    """

    def __init__(self, words: int, counts: Sequence[int], outputs: Sequence[int]) -> None: ...

class Call:
    """What all primitives share. ``strides``: rows per batch, batch and row stride in
    elements; ``vocab``: size, start, total. ``bounds``: of packed rows, 0 for rows of
    one length. ``threads``: on a CPU; ``device``, ``stream``: on a GPU.
    """

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
        bounds: int = 0,
        threads: int = 1,
        device: int = 0,
        stream: int = 0,
    ) -> None: ...

class OnePass:
    """A one-pass loss, all but its tensors. ``masks``: of ids, mask and denominator 0,
    strides between sequences and rows, bytes, whether the highest bit is a sign;
    ``inputs``: strides between sequences and rows, whether it is given, whether it is a
    number.
    """

    def __init__(
        self,
        call: Call,
        table: Table,
        params: Sequence[float],
        reads_p_sq: bool,
        entropy_gradient: bool,
        run: int,
        masks: Sequence[Sequence[int]],
        inputs: Sequence[Sequence[int]],
        divide: int,
        per_length: bool,
        horizon: float,
        terms: int,
        shared: bool,
    ) -> None: ...

def build_info() -> dict[str, Any]: ...
def level() -> str: ...
def set_level(name: str) -> None: ...
def token_stats(call: Call, out: Sequence[int]) -> int: ...
def top_stats(call: Call, out: Sequence[int], top: int, top_ids: int) -> int: ...
def token_grad(
    call: Call,
    stats: Sequence[int],
    derivatives: Sequence[int],
    out: int,
    out_strides: tuple[int, int, int],
) -> int: ...
def token_loss_grad(
    call: Call,
    table: Table,
    params: int,
    reads_p_sq: bool,
    entropy_gradient: bool,
    row_weights: int,
    row_weights_step: int,
    inputs: Sequence[int],
    rows: int,
    out: int,
    out_strides: tuple[int, int, int],
) -> int: ...
def evaluate_rows(
    fp64: bool,
    table: Table,
    params: int,
    leaves: Sequence[int],
    row_weights: int,
    row_weights_step: int,
    keep: int,
    outputs: Sequence[int],
    out: int,
    rows: int,
    threads: int,
) -> None: ...
def mask_rows(
    ids: tuple[int, int, int, int, int],
    mask: tuple[int, int, int, int, int],
    denominator: tuple[int, int, int, int, int],
    runs: tuple[int, int, int, int],
    out_ids: int,
    keep: int,
    counted: int,
    lengths: int,
) -> tuple[int, int]: ...
def regroup_rows(
    ids: tuple[int, int, int, int, int],
    lengths: int,
    runs: tuple[int, int, int, int],
    prompts: int,
    prompt_of: int,
    index: int,
    out_lengths: int,
) -> None: ...
def measure_rows(weight: int, keep: int, runs: tuple[int, int, int, int], sums: int) -> None: ...
def weigh_rows(
    keep: int,
    lengths: int,
    weight: int,
    runs: tuple[int, int, int, int],
    divide: int,
    divisor: float,
    per_length: bool,
    horizon: float,
    scale: float,
    factor: int,
    terms: int,
    out: int,
) -> None: ...
def one_pass_layout(call: OnePass) -> list[int]: ...
def run_one_pass(
    call: OnePass,
    addresses: Sequence[int],
    numbers: tuple[float, float, float, float, float, float, float, float, float],
    out_strides: tuple[int, int, int],
    threads: int,
) -> bool: ...
def divergence_stats(call: Call, other: Call, table: int) -> int: ...
def divergence_grad(
    call: Call,
    other: Call,
    table: int,
    derivatives: int,
    out: int,
    out_strides: tuple[int, int, int],
) -> int: ...
def divergence_loss_grad(
    call: Call,
    other: Call,
    table: int,
    constants: int,
    weights: int,
    out: int,
    out_strides: tuple[int, int, int],
) -> int: ...
def stream(kind: str, a: int, b: int, floats: int, threads: int) -> None: ...
