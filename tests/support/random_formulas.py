"""Rules and weights drawn from the grammar of formulas, and their reference: fp64
autograd with exact slopes.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import torch

from reweight_ops._core.formula.namespace import TorchNamespace
from reweight_ops.rules import TOKEN_FIELDS, Rule, TokenWeight, rule, weight

_UNARY = ("exp", "expm1", "log", "log1p", "sigmoid", "tanh", "abs", "stop_gradient")


def draw(r: random.Random, size: int) -> str:
    """A formula of about ``size`` operations as Python source over ``xp``, ``t`` and
    ``s`` (its hyper-parameters).
    """
    if size <= 0:
        return r.choice(
            [*(f"t.{leaf}" for leaf in TOKEN_FIELDS), "s.a", "s.b", "0.75", "-0.5", "2.0"]
        )
    kind = r.choice(["binary", "binary", "unary", "neg", "extremum", "clip", "where"])
    if kind == "unary":
        function = r.choice(_UNARY)
        inner = draw(r, size - 1)
        # The argument is mostly inside the function's domain, for the leaves of
        # `leaves()`.
        argument = {"log": f"xp.abs({inner}) + 0.5", "log1p": f"xp.abs({inner})"}.get(
            function, inner
        )
        return f"xp.{function}({argument} + 0 * t.adv)"
    if kind == "neg":
        return f"(-{draw(r, size - 1)})"
    left, right = draw(r, (size - 1) // 2), draw(r, size - 1 - (size - 1) // 2)
    if kind == "extremum":
        return f"xp.{r.choice(['minimum', 'maximum'])}({left} + 0 * t.adv, {right})"
    if kind == "clip":
        return f"xp.clip({left} + 0 * t.adv, {r.choice(['-0.5', '-s.b'])}, {r.choice(['0.75', 's.a', right])})"
    if kind == "where":
        condition = f"({left} + 0 * t.adv {r.choice(['<', '<=', '>', '>='])} {r.choice(['0.25', 's.a', 't.entropy'])})"
        if r.random() < 0.3:
            condition = f"({condition} {r.choice('&|')} ~(t.adv > s.b))"
        return f"xp.where({condition}, {left}, {right})"
    return f"({left} {r.choice(['+', '-', '*', '/'])} {right})"


def _class(base: type, name: str, source: str, method: str, arguments: str):
    formula = eval(f"lambda s, {arguments}: ({source}) + 0 * t.adv")
    body = {
        "__annotations__": {"a": float, "b": float},
        "a": 0.75,
        "b": 0.3,
        method: formula,
        "source": source,
    }
    return (rule if base is Rule else weight)(name)(type("Drawn", (base,), body))


def drawn_rule(seed: int, name: str = "drawn_rule", size: int = 9) -> type[Rule]:
    """A registered rule; tests/conftest.py forgets it after the test."""
    return _class(Rule, name, draw(random.Random(seed), size), "loss", "xp, t")


def draw_statistic(r: random.Random, depth: int) -> str:
    """A formula of statistics of the batch, of statistics of statistics at a depth
    above 1.
    """
    x = f"({draw(r, r.randint(0, 3))} + 0 * t.adv)"
    if depth > 1:
        x = f"({x} {r.choice('+-*')} xp.tanh({draw_statistic(r, depth - 1)}))"
    name = r.choice(
        [
            *("mean", "sum", "min", "max", "rank", "mean_below", "quantile", "quantile_nearest"),
            *("top", "largest", "capped_mean", "seq_sum", "seq_mean", "seq_max", "seq_min"),
            *("seq_cumsum", "seq_suffix_sum", "seq_rank", "seq_quantile"),
            *("group_sum", "group_mean", "group_max", "group_min"),
        ]
    )
    where = "t.adv > s.b - 0.5"
    more = {
        "quantile": r.choice([", s.b", ", 1 - s.a", f", 0.4, {where}", f", q=0.25, where={where}"]),
        "quantile_nearest": ", xp.exp(-s.a)",
        "seq_quantile": ", 0.5 * s.b",
        "seq_cumsum": r.choice(["", ", s.a", ", decay=0.9"]),
        "seq_suffix_sum": r.choice(["", ", 0.5 * s.a"]),
        "top": f", s.b, {where}",
        "largest": ", s.a",
        "capped_mean": f", {where}",
    }
    return f"batch.{name}({x}{more.get(name, '')})"


def drawn_statistics(seed: int, depth: int, name: str = "drawn_weight") -> type[TokenWeight]:
    """A registered weight that reads statistics of the batch more than once."""
    r = random.Random(seed)
    a, b = draw_statistic(r, depth), draw_statistic(r, r.randint(1, depth))
    source = f"xp.where({draw(r, 2)} <= {a}, {b} - {a}, {draw(r, 3)} * {b})"
    return _class(TokenWeight, name, source, "weight", "xp, t, batch")


def drawn_weight(seed: int, name: str = "drawn_weight", size: int = 4) -> type[TokenWeight]:
    """A registered weight; tests/conftest.py forgets it after the test."""
    return _class(TokenWeight, name, draw(random.Random(~seed), size), "weight", "xp, t, batch")


class _Exact(torch.autograd.Function):
    """A function with a separate slope: torch's own 1 - tanh(x)² and expm1(x) + 1 lose
    their digits in the tails.
    """

    @staticmethod
    def forward(ctx, x, function, slope):
        ctx.save_for_backward(slope(x))
        return function(x)

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.saved_tensors[0], None, None


class ExactSlopes(TorchNamespace):
    def sigmoid(self, x):
        return _Exact.apply(x, torch.sigmoid, lambda x: 1 / (2 + 2 * torch.cosh(x)))

    def tanh(self, x):
        return _Exact.apply(x, torch.tanh, lambda x: 1 / torch.cosh(x) ** 2)

    def expm1(self, x):
        return _Exact.apply(x, torch.expm1, torch.exp)


def truth(terms, weights, params, leaves, row_weights) -> dict[str, torch.Tensor]:
    """Every output of a loss, by fp64 autograd through the formulas themselves.

    ``terms`` are rules, ``weights`` are (weight, scope), and ``params`` are as a
    program takes them.
    """
    xp, numbers = ExactSlopes(torch.float64), iter(params.double().tolist())
    low, high = next(numbers), next(numbers)
    x = {name: v.double().clone().requires_grad_() for name, v in leaves.items()}
    w = row_weights.double().clone().requires_grad_()
    t = SimpleNamespace(**x)
    if "log_ratio" not in leaves:
        t.log_ratio = (x["logp"] - x["old_logp"]).clamp(low, high)

    def made(cls):
        return cls(**{name: next(numbers) for name in cls.parameter_names()})

    rules = [(next(numbers), made(cls)) for cls in terms]
    us = [(made(cls).weight(xp, t, None).detach(), scope) for cls, scope in weights]
    loss = weighted = 0 * x["logp"].detach()
    own = {}
    for k, (coef, r) in enumerate(rules):
        factor = torch.full_like(loss, coef)
        for u, scope in us:
            factor = factor * u if k == 0 or scope == "all" else factor
        value = r.loss(xp, t)
        share = w[k].detach() * factor
        own[f"own{k}"] = torch.where(share == 0, 0, share / coef * value).detach()
        loss = loss + torch.where(w[k] * factor == 0, 0, factor * value)
        weighted = weighted + torch.where(factor == 0, 0, w[k] * factor * value)
    grads = torch.autograd.grad(
        weighted.sum(), [*x.values(), w], allow_unused=True, materialize_grads=True
    )
    found = {"weighted_loss": weighted.detach(), "loss": loss.detach()}
    found |= own
    found |= {f"d_{name}": g for name, g in zip(x, grads, strict=False)}
    return found | {f"d_w{k}": grads[-1][k] for k in range(len(rules))}
