"""The CUDA kernels on raw addresses, without any check. The primitives are those of
:mod:`reweight_ops._C`, on a GPU: they launch, and return a CUDA status.
"""

from ._C import Call as Call
from ._C import Table as Table
from ._C import divergence_grad as divergence_grad
from ._C import divergence_loss_grad as divergence_loss_grad
from ._C import divergence_stats as divergence_stats
from ._C import token_grad as token_grad
from ._C import token_loss_grad as token_loss_grad
from ._C import token_stats as token_stats

operations: list[str]
max_registers: int
sources: str

def scale(
    dtype: int,
    data: int,
    strides: tuple[int, int, int],
    rows: int,
    columns: int,
    factor: int,
    device: int = 0,
    stream: int = 0,
) -> int: ...
def ring_unsupported_reason(call: Call, out: int, out_strides: tuple[int, int, int]) -> str: ...
def set_kernel(name: str) -> None: ...
def split_unsupported_reason(call: Call, other: Call) -> str: ...
def divergence_blocks(columns: int) -> int: ...
def set_divergence_kernel(name: str) -> None: ...
def error_string(status: int) -> str: ...
def runtime_version() -> int: ...
def archs() -> str: ...
