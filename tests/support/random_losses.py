"""Losses of random rules and weights (tests/support/random_formulas.py), and the
reference for every backend.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from random_formulas import drawn_rule, drawn_weight, truth
from running_error import evaluate as bounded
from running_error import no_tie

from reweight_ops._core.backends.base import RowInputs, SoftmaxParams
from reweight_ops._core.backends.select import load
from reweight_ops._core.formula.loss_program import Program, loss_graph
from reweight_ops._core.formula.trace import trace_rule
from reweight_ops.rules import TOKEN_FIELDS

GIVEN = tuple(x for x in TOKEN_FIELDS if x != "log_ratio")


class Drawn:
    """A random loss: one to three terms and up to two weights, with parameters and rows
    to evaluate it on.
    """

    def __init__(self, seed: int, n: int = 64) -> None:
        g = torch.Generator().manual_seed(seed)
        self.rules = [drawn_rule(8 * seed + k, f"drawn_rule_{k}") for k in range(1 + seed % 3)]
        self.weights = [
            (drawn_weight(8 * seed + j, f"drawn_weight_{j}"), ("surrogate", "all")[j])
            for j in range(seed // 3 % 3)
        ]
        self.program = Program.of(self.rules, self.weights)
        values = [-0.6, 0.8]
        for k in range(len(self.rules)):
            values += [(1.0, 0.04, -0.5)[k], 0.75, 0.3]
        self.params = torch.tensor([*values, *[0.75, 0.3] * len(self.weights)])
        self.leaves = {name: torch.randn(n, generator=g) for name in GIVEN}
        self.row_weights = torch.rand(len(self.rules), n, generator=g)
        self.row_weights[:, ::7] = 0.0

    def environment(self, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Every value that the graph's nodes name, in fp64."""
        found = {name: x.double() for name, x in leaves.items()}
        found |= {f"w{k}": w.double() for k, w in enumerate(self.row_weights)}
        return found | {f"p{i}": x.double() for i, x in enumerate(self.params.unbind())}

    def usable(self, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
        """Rows without ties of minimum, maximum or clip, where conventions differ."""
        low, high = self.params[:2].double()
        known = {name: x.double() for name, x in leaves.items()}
        known.setdefault("log_ratio", (known["logp"] - known["old_logp"]).clamp(low, high))
        known |= {
            "a": self.params.new_tensor(0.75).double(),
            "b": self.params.new_tensor(0.3).double(),
        }
        good = torch.ones_like(known["logp"], dtype=torch.bool)
        for cls in self.rules:
            good &= no_tie(trace_rule(cls), known)
        return good

    def check(
        self,
        got: torch.Tensor,
        names: tuple[str, ...],
        leaves: dict[str, torch.Tensor],
        u: float,
        slack: float = 1.0,
    ) -> int:
        """Check that every output is within ``slack`` running error bounds of the
        reference; return the number of checked values.
        """
        graph = loss_graph(self.program, "log_ratio" in leaves)
        roots = [graph[name] for name in names]
        exact, judged = truth(self.rules, self.weights, self.params, leaves, self.row_weights), 0
        usable = self.usable(leaves)
        bounds = bounded(roots, self.environment(leaves), u)
        for name, have, (_, bound) in zip(names, got, bounds, strict=True):
            want = exact[name]
            ok = usable & want.isfinite() & bound.isfinite()
            wrong = (have.double() - want).abs() > slack * bound
            at = int((wrong & ok).to(torch.int).argmax())
            assert not (wrong & ok).any(), (
                f"{name}: {have[at]} instead of {want[at]}, bound {bound[at]}: {[c.source for c in self.rules]}"
            )
            judged += int(ok.sum())
        return judged


def check_one_pass(module: Any, seeds: Iterable[int]) -> None:
    """Check one pass from logits. The rows are from the backend's own statistics, and
    the gradient is from the exact derivatives by them.
    """
    n, v, judged, asked = 24, 40, 0, 0
    names = ("logp", "entropy", "log_sum_p_sq", "lse")
    for seed in seeds:
        drawn = Drawn(seed, n)
        g = torch.Generator().manual_seed(seed)
        z, ids, one = (
            torch.randn(n, v, generator=g),
            torch.randint(0, v, (n,), generator=g),
            torch.ones(1),
        )
        stats = dict(
            zip(names, module.token_stats(z, ids, one, SoftmaxParams(v), names), strict=True)
        )
        leaves = drawn.leaves | {name: stats[name] for name in names[:3]}
        leaves["old_logp"] = stats["logp"] + 0.5 * drawn.leaves["old_logp"]
        inputs = RowInputs(
            drawn.row_weights,
            leaves["old_logp"],
            *(leaves[x] for x in ("adv", "ref_logp", "sampling_logp")),
        )
        out = torch.full_like(z, math.nan)
        rows = module.token_loss_grad(
            z, ids, one, SoftmaxParams(v), inputs, drawn.program, drawn.params, out
        )
        assert torch.equal(rows[0], stats["logp"])
        by = ("d_logp", "d_entropy", "d_log_sum_p_sq")
        judged += drawn.check(rows[2:], ("weighted_loss", "loss", *by[:2]), leaves, 2.0**-24)
        asked += 4 * n
        exact = truth(drawn.rules, drawn.weights, drawn.params, leaves, drawn.row_weights)
        bounds = bounded(
            [loss_graph(drawn.program)[name] for name in by], drawn.environment(leaves)
        )
        want = torch.full((n, v), math.nan, dtype=torch.float64)
        derivatives = {name.removeprefix("d_"): exact[name] for name in by}
        load("reference").token_grad(
            z.double(),
            ids,
            one.double(),
            SoftmaxParams(v),
            {k: x.double() for k, x in stats.items()},
            derivatives,
            want,
        )
        # The slopes of logp, entropy and log_sum_p_sq by a logit are at most 1, 2 log V
        # and 2.
        size = (1.0, 2 * math.log(v), 2.0)
        bound = sum(
            k * (e + 2.0**-16 * exact[name].abs())
            for k, name, (_, e) in zip(size, by, bounds, strict=True)
        )
        ok = drawn.usable(leaves) & bound.isfinite() & want.isfinite().all(1)
        assert ((out - want).abs()[ok] <= bound[ok, None]).all(), [c.source for c in drawn.rules]
    assert judged > 0.6 * asked
