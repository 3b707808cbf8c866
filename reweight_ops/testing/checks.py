"""What ``reweight-ops check`` runs.

The accuracy criterion judges every loss and op on every backend and dtype of this
machine. Golden rows judge the other entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from .._core.backends.base import Request
from .._core.backends.select import NAMES, unsupported_reason
from .._core.calls.sampling_mask import ENTROPIES
from .._core.calls.specs import method
from .._core.catalogue.registry import CATALOGUE
from ..errors import InvalidCall
from . import Comparison, compare, make_batch
from .batches import make_sampling_mask
from .golden import golden_error
from .golden_ops import GOLDEN_OPS
from .golden_row import Golden
from .golden_rows import GOLDEN, GOLDEN_KINDS
from .ops import OPS, compare_op, make_op_batch
from .pairs import compare_divergence, compare_pairs, make_divergence, make_pairs

#: The kinds that are compared with the fp64 reference. Of the divergences only the one
#: that has kernels is compared. The others have golden rows.
LOSS_KINDS = ("policy_loss", "pair_loss", "divergence")
#: Ops and modules, which are not entries of the catalogue.
OP = "op"
_KERNELS = ("token_divergence",)
DIRECTIONS = ("forward_kl", "reverse_kl")
#: This policy loss is also compared with a sampling mask, and with an entropy bonus.
_MASKED = "grpo"
DTYPES = ("float32", "bfloat16", "float16")
#: A loss scale that keeps fp16 gradients from being subnormal.
LOSS_SCALE = 64.0


@dataclass(frozen=True)
class Case:
    backend: str
    method: str
    dtype: str
    device: str
    kind: str = "policy_loss"
    #: The direction of a divergence. For a policy loss with a sampling mask it is the
    #: set of its entropy. For an op it is the result or keyword.
    direction: str = ""


def compared(kind: str) -> list[str]:
    """The names of a kind's entries that are compared with the reference."""
    if kind == OP:
        return list(OPS)
    names = sorted(CATALOGUE[kind]) if kind in LOSS_KINDS else []
    return [name for name in names if kind != "divergence" or name in _KERNELS]


def by_hand(kind: str) -> list[str]:
    """The names of a kind's entries that have golden rows."""
    if kind == OP:
        return list(GOLDEN_OPS)
    if kind == "pair_loss":  # also compared with the reference
        return sorted(CATALOGUE[kind])
    return sorted(set(CATALOGUE[kind]) - set(compared(kind)))


@dataclass(frozen=True)
class Selection:
    """What to check. An empty field means everything. A name selects the entries of
    that name in all selected kinds (GRPO is a loss and an advantage).
    """

    backends: Sequence[str] = ()
    methods: Sequence[str] = ()
    kinds: Sequence[str] = ()
    dtypes: Sequence[str] = DTYPES

    def __post_init__(self) -> None:
        kinds = tuple(dict.fromkeys((*LOSS_KINDS, OP, *GOLDEN_KINDS)))
        _known("kind", self.kinds, kinds)
        _known("backend", self.backends, NAMES)
        _known("dtype", self.dtypes, DTYPES)
        _known(
            "method",
            self.methods,
            sorted(
                {name for kind in self.kinds or kinds for name in (*compared(kind), *by_hand(kind))}
            ),
        )
        for backend in self.backends:
            if not _devices(backend):
                request = Request("token_stats", torch.device("cpu"), torch.float32)
                raise InvalidCall(f"check: {backend}: {unsupported_reason(backend, request)}")

    def entries(
        self, kinds: Iterable[str], names: Callable[[str], list[str]]
    ) -> list[tuple[str, str]]:
        """The kind and the name of every selected entry of some kinds."""
        found = [
            (kind, name) for kind in kinds if kind in (self.kinds or kinds) for name in names(kind)
        ]
        return [(kind, name) for kind, name in found if name in (self.methods or [name])]


def _known(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    unknown = [x for x in given if x not in known]
    if unknown:
        raise InvalidCall(
            f"check: unknown {what} {', '.join(unknown)}; expected one of {', '.join(known)}."
        )


def _devices(backend: str) -> list[str]:
    available = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [
        d
        for d in available
        if unsupported_reason(backend, Request("token_stats", torch.device(d), torch.float32))
        is None
    ]


def _directions(kind: str, name: str) -> tuple[str, ...]:
    if kind == OP:
        return tuple(OPS[name])
    if kind == "divergence":
        return DIRECTIONS
    return ("", *ENTROPIES) if (kind, name) == ("policy_loss", _MASKED) else ("",)


def cases(selection: Selection) -> list[Case]:
    """The losses to compare with the fp64 reference."""
    places = [
        (backend, devices[-1])
        for backend in selection.backends or NAMES
        if (devices := _devices(backend))
    ]
    return [
        Case(backend, name, dtype, device, kind, direction)
        for backend, device in places
        for kind, name in selection.entries((*LOSS_KINDS, OP), compared)
        for direction in _directions(kind, name)
        for dtype in selection.dtypes
    ]


def run_case(case: Case, vocab: int) -> Comparison:
    """Compare the loss and the gradient of one case.

    The plan is one_pass where the spec allows it and the backend has it. A loss scale
    lets fp16 take that plan too.
    """
    dtype, backend = getattr(torch, case.dtype), case.backend
    if case.kind == OP:
        judged = OPS[case.method][case.direction]
        return compare_op(
            judged,
            make_op_batch((4, 16), vocab, dtype, case.device),
            backend=backend,
            loss_scale=LOSS_SCALE,
        )
    if case.kind == "divergence":
        return compare_divergence(
            case.direction,
            make_divergence((4, 16), vocab, dtype, case.device),
            backend=backend,
            loss_scale=LOSS_SCALE,
        )
    if case.direction:
        masked = method(case.method, entropy_coef=0.01)
        batch = make_batch(masked, (4, 16), vocab, dtype, case.device)
        return compare(
            masked,
            batch,
            backend=backend,
            loss_scale=LOSS_SCALE,
            sampling_mask=make_sampling_mask(batch),
            entropy_over=case.direction,
        )
    spec = CATALOGUE[case.kind][case.method].build()
    if case.kind == "pair_loss":
        return compare_pairs(
            spec,
            make_pairs(spec, 4, 8, vocab, dtype, case.device),
            backend=backend,
            loss_scale=LOSS_SCALE,
        )
    return compare(
        spec,
        make_batch(spec, (4, 16), vocab, dtype, case.device),
        backend=backend,
        loss_scale=LOSS_SCALE,
    )


@dataclass(frozen=True)
class GoldenCase:
    """The golden rows of an entry. They are PyTorch on small vectors. They run in fp64
    on the CPU, and in fp32 on a GPU if there is one.
    """

    kind: str
    name: str
    dtype: str
    device: str

    @property
    def rows(self) -> list[Golden]:
        return [row for row in GOLDEN if (row.kind, row.name) == (self.kind, self.name)]


def golden_cases(selection: Selection) -> list[GoldenCase]:
    """The entries whose golden rows are evaluated.

    No backend computes these entries. They are left out where only backends other than
    ``reference`` are asked for.
    """
    if selection.backends and "reference" not in selection.backends:
        return []
    places = [("float64", "cpu"), *([("float32", "cuda")] if torch.cuda.is_available() else [])]
    return [
        GoldenCase(kind, name, *place)
        for kind, name in selection.entries(GOLDEN_KINDS, by_hand)
        for place in places
    ]


def run_golden(case: GoldenCase) -> float:
    """The worst error of an entry's rows, as a multiple of what is allowed. It is
    ``inf`` without a row.
    """
    return max(
        (golden_error(row, getattr(torch, case.dtype), case.device) for row in case.rows),
        default=float("inf"),
    )
