"""Calls that launch every kernel on rows of the Triton backend, in each of its
compilations: with all options, and sequences that are padded, or packed in two ways.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from reweight_ops._core.backends import triton_rows
from reweight_ops._core.formula.base import RULES
from reweight_ops._core.formula.loss_program import Program
from reweight_ops._core.formula.monitor import Monitor
from reweight_ops._core.rows.groups import Groups
from reweight_ops._core.rows.primitives import (
    Averaged,
    CoupledTerms,
    Coupling,
    Masked,
    Runs,
    Weighing,
)

PROGRAM = Program.of(("clip", "k3", "entropy_bonus"), (("advantage_reweighting", "surrogate"),))
PARAMS = torch.zeros(16)
MONITOR = Monitor.of([RULES["clip"], RULES["k3"]], PROGRAM.terms[:2])
#: The bounds of the clip are one for each row.
BOUNDS_OF_ROWS = ((3, 3), (4, 4))
#: What :func:`row_calls` calls, step by step.
STEPS = ("masks and weights", "sequences", "the call", "prompts", "rows", "metrics")


def row_calls(sequences: int, length: int, where: str = "cpu") -> Iterator[None]:
    """Call them in STEPS, on zeros."""
    device = torch.device(where)

    def zeros(*shape, **more):
        return torch.zeros(*shape, **more, device=device)

    n = sequences * length
    ids, rows = zeros(sequences, length, dtype=torch.int64), zeros(6, n)
    kept, params, one = ids + 1, PARAMS.to(device), zeros(()) + 1
    place = torch.arange(n, dtype=torch.int32)
    runs = [
        Runs(n, sequences, length),
        Runs(n, sequences, offsets=(place[: sequences + 1] * length).to(device)),
        Runs(n, sequences, owner=(place // length).to(device)),
    ]
    flat, flat_kept = ids.view(-1), kept.view(-1)
    packed = [triton_rows.mask(flat, flat_kept, flat_kept.bool(), r, device) for r in runs[1:]]
    triton_rows.spread(packed[0], rows[0, :sequences])
    values = rows[0].view(sequences, length)
    masked = triton_rows.mask(ids, kept, kept.bool(), runs[0], device, values)
    for weighing in (
        Weighing("rows"),
        Weighing("sequences", True),
        Weighing(3.0, False, 5.0),
        Weighing(one, True),
    ):
        weights = triton_rows.weigh(masked, (weighing,) * 2, one, rows[0])
        triton_rows.weigh(packed[0], (weighing,) * 2, one, rows[0])
    groups = zeros(sequences + 1, dtype=torch.int64)
    by_prompt = [
        triton_rows.regroup(masked, groups[1:], 5)[0],
        triton_rows.regroup(packed[0], zeros(sequences, dtype=torch.int32), 1)[0],
    ]
    measured = [triton_rows.measure(found, rows[:2]) for found in (*packed, masked)]
    for weighing in (Weighing("rows"), Weighing("sequences", True)):
        for found in (measured[0], measured[-1]):
            triton_rows.weigh(found, (weighing._replace(weight=0),) * 2, one, rows[0])
    for found in by_prompt:  # they are packed rows
        triton_rows.weigh(found, (Weighing("sequences", True),) * 2, one, rows[0])
    for found in (measured[0], measured[-1]):
        for unlike in (
            (Weighing(3.0), Weighing("rows", weight=0)),
            (Weighing("rows", weight=1), Weighing("sequences", True, weight=0)),
        ):
            triton_rows.weigh(found, (*unlike, unlike[0]), one, rows[0])
    yield
    for found in (*packed, masked):
        for adv in (None, rows[2]):
            averaged = Averaged(rows[0], rows[1], params, adv=adv)
            ratio, means = triton_rows.ratio(found, averaged)
        for statistic in ("sum", "mean", "max", "min"):
            triton_rows.total(found, rows[0], statistic, True)
        triton_rows.total(found, 1.0, "sum", True, rows[5])
        for values, decay, reverse in (
            (1.0, 1.0, False),
            (rows[0], 1.0, True),
            (rows[0], 0.9, False),
            (rows[0], one, True),
        ):
            triton_rows.along(found, values, decay, reverse)
        averaged = Averaged(rows[0], rows[1], params, over="prefix")
        found_along = triton_rows.ratio(found, averaged)
        triton_rows.adjoint(found, averaged, found_along[1], rows[2], rows[5])
    yield
    for by_deviation in (False, True):
        averaged = Averaged(rows[0], rows[1], params, by_deviation, over="call")
        _, centre = triton_rows.ratio(masked, averaged)
        triton_rows.adjoint(masked, averaged, centre, rows[2], rows[5])
    for values, statistic in (
        (rows[0], "sum"),
        (rows[0], "mean"),
        (rows[0], "max"),
        (rows[0], "min"),
        (1.0, "sum"),
    ):
        triton_rows.total(masked, values, statistic, False)
    for nearest in (False, True):
        triton_rows.quantile(masked, rows[0], 0.3, nearest)
    yield
    _couple((*packed, masked), groups[1:], rows)
    yield
    leaves = dict(
        zip(
            ("logp", "old_logp", "adv", "entropy", "ref_logp", "sampling_logp"),
            rows,
            strict=True,
        )
    )
    table = triton_rows.evaluate_rows(
        PROGRAM, params, leaves, torch.cat([weights, weights[:1]]), keep=masked.keep
    )
    triton_rows.evaluate_rows(
        PROGRAM,
        params,
        leaves | {"log_ratio": ratio},
        torch.cat([weights, weights[:1]]),
        ("loss", "d_log_ratio"),
    )
    bounds_of_rows = zeros(5, n)
    triton_rows.evaluate_rows(
        PROGRAM._replace(rows=BOUNDS_OF_ROWS),
        params,
        leaves,
        bounds_of_rows,
        ("own0", "d_w1"),
        masked.keep,
        zeros(2, n),
    )
    for found in (*packed, masked):
        for adv in (None, rows[2]):
            averaged = Averaged(rows[0], rows[1], params, adv=adv)
            triton_rows.adjoint(found, averaged, means, table[0], table[1])
    yield
    for monitor, found, known in (
        (MONITOR, masked, leaves),
        (
            MONITOR._replace(rows=BOUNDS_OF_ROWS),
            masked,
            leaves | {"table": bounds_of_rows},
        ),
        *((MONITOR, found, leaves | {"log_ratio": ratio}) for found in (*packed, masked)),
    ):
        triton_rows.metrics(
            found,
            monitor,
            params,
            known,
            ("entropy", "low", "largest ratio", "sequence region"),
        )
    yield


def _couple(found: Sequence[Masked], prompt_of: Tensor, rows: Tensor) -> None:
    """Launch the kernels of coupled reductions for terms of every kind, with prompts
    given in both ways, and for a hinge alone.
    """
    hinge, sequences = Coupling("hinge", (1.0, 1.0)), len(prompt_of)
    for masked in found:
        for prompts in (Groups(1, sequences), Groups(5, index=prompt_of)):
            contrast = Coupling("contrast", (2.0, 3.0), prompts)
            for kinds, logp in (
                ((contrast, hinge, None), rows[5]),
                ((contrast, hinge, None), None),
                ((contrast._replace(prefers="length"), hinge, None), None),
                ((contrast._replace(prefers="advantages", hard=True), hinge, None), None),
                ((contrast._replace(kind="classification"), hinge, None), None),
                ((None, hinge), None),
            ):
                numbers, part = rows[4, : 1 + 3 * len(kinds)] + 1, rows[: 1 + len(kinds)]
                terms = CoupledTerms(kinds, numbers, part, part, rows[4], logp)
                triton_rows.couple(masked, terms, torch.empty_like(rows[:2]))
