"""Print rules and weights as Triton: the package's own as ``triton_kernels/rules.py``, and a module for any :class:`Program`.

A program module has one function, ``program``, that a kernel calls once per row: everything between the row's statistics and
the coefficients of its gradient. The package's rules are imported into it; a user's are printed into it.
"""

from __future__ import annotations

import builtins
import keyword
from typing import NamedTuple

from .base import DIFFERENTIABLE_LEAVES, LEAVES, RULES, WEIGHTS, Rule, TokenWeight
from .derive import derive, value
from .printer import GENERATED, Language, own_rules, own_weights, statements
from .program import Program
from .trace import trace_rule, trace_weight

_FUNCTIONS = ("exp", "expm1", "log", "log1p", "sigmoid", "tanh", "abs")
_INFIX = {
    "add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "div": "{} / {}", "neg": "-{}", "lt": "{} < {}", "le": "{} <= {}",
    "eq": "{} == {}", "ne": "{} != {}", "and": "{} & {}", "or": "{} | {}", "not": "~{}",
}  # fmt: skip

TRITON = Language(
    templates=_INFIX
    | {f: f"math.{f}({{}})" for f in _FUNCTIONS}
    | {"min": "math.minimum({}, {})", "max": "math.maximum({}, {})", "clip": "math.clip({}, {}, {})", "where": "tl.where({}, {}, {})"},
    infix=frozenset(_INFIX),
    statement="{name} = {value}",
    number="{}",
    infinity='float("inf")',
    leaf="{}",
    reserved=frozenset({*keyword.kwlist, *dir(builtins), "tl", "math", "triton"}),
)

_HEADER = "# ruff: noqa\n# fmt: off\nimport triton\nimport triton.language as tl\n"


class Facts(NamedTuple):
    """What a kernel must know of a program when it is compiled."""

    reads: frozenset[str]  # leaves
    moves: frozenset[str]  # differentiable leaves through which the gradient can be nonzero


def _function(name: str, parameters: tuple[str, ...], body: list[str]) -> str:
    arguments = ", ".join([*LEAVES, *(TRITON.local(p) for p in parameters)])
    return f"@triton.jit\ndef {name}({arguments}):\n" + "".join(f"    {line}\n" for line in body)


def rule_function(cls: type[Rule]) -> str:
    """``rule_<name>(<leaves>, <hyper-parameters>) -> (loss, d_logp, d_log_ratio, d_entropy, d_log_sum_p_sq)``."""
    traced = trace_rule(cls)
    lines, values = statements(TRITON, [value(traced), *derive(traced).values()])
    return _function(f"rule_{cls.name}", traced.parameters, [*lines, f"return {', '.join(values)}"])


def weight_function(cls: type[TokenWeight]) -> str:
    """``weight_<name>(<leaves>, <hyper-parameters>) -> weight``."""
    traced = trace_weight(cls)
    if traced.uses_batch:
        raise TypeError(f"the weight {cls.name!r} reads the batch: no kernel can evaluate it.")
    lines, values = statements(TRITON, [value(traced)])
    return _function(f"weight_{cls.name}", traced.parameters, [*lines, f"return {values[0]}"])


def rules_py() -> str:
    """The text of ``triton_kernels/rules.py``."""
    functions = [rule_function(cls) for cls in own_rules().values()] + [weight_function(cls) for cls in own_weights().values()]
    return "\n\n".join([f'"""{GENERATED}"""\n\n{_HEADER}\nfrom . import math\n', *functions])


def facts(program: Program) -> Facts:
    """Which leaves a program reads, and which of its partial derivatives are not zero by the formula."""
    rules = [trace_rule(RULES[name]) for name in program.terms]
    weights = [trace_weight(WEIGHTS[name]) for name, _ in program.weights]
    partials = [derive(t) for t in rules]
    moves = {leaf for d in partials for leaf, x in d.items() if not (x.op == "const" and x.args[0] == 0)}
    return Facts(frozenset().union(*(t.leaves for t in [*rules, *weights])), frozenset(moves))


def program_py(program: Program) -> str:
    """The source of a module whose ``program`` evaluates every term and weight of one row.

    ``program(params, w, w_stride, <leaves but log_ratio>)`` returns ``weighted_loss, loss`` and the derivatives of the first by
    logp (through the ratio too), entropy and log_sum_p_sq; ``w + k * w_stride`` is the address of the row weight of term ``k``.
    """
    ours = {**own_rules(), **own_weights()}
    used: dict[str, type] = {f"rule_{n}": RULES[n] for n in program.terms} | {f"weight_{n}": WEIGHTS[n] for n, _ in program.weights}
    imports = [name for name, cls in used.items() if cls in ours.values()]
    out = [_HEADER + "\nfrom reweight_ops.triton_kernels import math"]
    if imports:
        out[0] += f"\nfrom reweight_ops.triton_kernels.rules import {', '.join(sorted(imports))}"
    for name, cls in used.items():
        if name not in imports:
            out.append(rule_function(cls) if issubclass(cls, Rule) else weight_function(WEIGHTS[cls.name]))  # type: ignore[attr-defined]

    offset = 2  # after the two bounds of the log-ratio

    def loads(cls: type) -> str:
        nonlocal offset
        first, offset = offset, offset + len(cls.parameter_names())  # type: ignore[attr-defined]
        return "".join(f", tl.load(params + {i})" for i in range(first, offset))

    # The vector of parameters has the rules first, the weights are needed first.
    leaves = ", ".join(LEAVES)
    terms = []
    for k, name in enumerate(program.terms):
        coefficient, offset = offset, offset + 1
        terms.append((k, coefficient, f"rule_{name}({leaves}{loads(RULES[name])})"))
    body = [
        "clamp_low, clamp_high = tl.load(params), tl.load(params + 1)",
        "drift = logp - old_logp",
        "log_ratio = math.clip(drift, clamp_low, clamp_high)",
        "inside = (clamp_low <= drift) & (drift <= clamp_high)",
        "surrogate_weight = 1.0",
        "all_weight = 1.0",
    ]
    for name, scope in program.weights:
        body += [f"u = weight_{name}({leaves}{loads(WEIGHTS[name])})", "surrogate_weight *= u"]
        body += ["all_weight *= u"] if scope == "all" else []
    moves = facts(program).moves
    names = {"weighted_loss": "loss", "loss": "loss"} | {f"d_{x}": f"d_{x}" for x in DIFFERENTIABLE_LEAVES if x in moves}
    zero = "tl.full((), 0.0, tl.float32)"
    body += [f"total_{name} = {zero}" for name in names] + ["sick = clamp_low != clamp_low"]
    for k, coefficient, call in terms:
        body += [
            f"scale = tl.load(params + {coefficient}) * {'all_weight' if k else 'surrogate_weight'}",
            f"factor = tl.load(w + {k} * w_stride) * scale",
            f"loss, {', '.join(f'd_{x}' for x in DIFFERENTIABLE_LEAVES)} = {call}",
        ]
        # A factor of zero selects zero (a masked row may hold inf * 0), and a sick row is NaN whatever the rule's comparisons say.
        body += [f"total_{n} += tl.where(factor == 0.0, 0.0, {'scale' if n == 'loss' else 'factor'} * {v})" for n, v in names.items()]
        body.append("sick |= (factor != 0.0) & (logp != logp)")
    d_logp = "tl.where(sick, logp, total_d_logp)" if "logp" in moves else "tl.where(sick, logp, 0.0)"
    if "log_ratio" in moves:
        d_logp += " + tl.where(inside, total_d_log_ratio, 0.0)"
    others = [f"total_d_{x}" if x in moves else zero for x in ("entropy", "log_sum_p_sq")]
    body.append(f"return total_weighted_loss, total_loss, {', '.join([d_logp, *others])}")
    signature = f"params, w, w_stride, {', '.join(x for x in LEAVES if x != 'log_ratio')}"
    out.append(f"@triton.jit\ndef program({signature}):\n" + "".join(f"    {line}\n" for line in body))
    return "\n\n\n".join(out)
