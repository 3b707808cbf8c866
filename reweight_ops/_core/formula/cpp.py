"""Print every rule and weight of the package as ``csrc/common/rules.inc``: C++17, host and device."""

from __future__ import annotations

from .base import DIFFERENTIABLE_LEAVES, LEAVES
from .derive import derive, value
from .printer import GENERATED, Language, own_rules, own_weights, statements
from .trace import Expr, trace_rule, trace_weight, walk

_FUNCTIONS = ("exp", "expm1", "log", "log1p", "sigmoid", "tanh", "abs")
_INFIX = {
    "add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "div": "{} / {}", "neg": "-{}", "where": "{} ? {} : {}",
    "lt": "{} < {}", "le": "{} <= {}", "eq": "{} == {}", "ne": "{} != {}", "and": "{} && {}", "or": "{} || {}", "not": "!{}",
}  # fmt: skip

_KEYWORDS = frozenset({
    "auto", "bool", "break", "case", "char", "const", "constexpr", "continue", "default", "delete", "do", "double", "else", "enum",
    "export", "extern", "false", "float", "for", "if", "inline", "int", "long", "mutable", "new", "operator", "private", "protected",
    "public", "register", "return", "short", "signed", "sizeof", "static", "struct", "switch", "template", "this", "throw", "true",
    "try", "typedef", "typename", "union", "unsigned", "using", "virtual", "void", "volatile", "while", "params", "rule", "weight",
})  # fmt: skip

CPP = Language(
    templates=_INFIX
    | {f: f"rw_{f}({{}})" for f in _FUNCTIONS}
    | {"min": "rw_min({}, {})", "max": "rw_max({}, {})", "clip": "rw_clip({}, {}, {})"},
    infix=frozenset(_INFIX),
    statement="const {type} {name} = {value};",
    number="{}f",
    infinity="RW_INF",
    leaf="t.{}",
    reserved=_KEYWORDS,
)


def _function(signature: str, parameters: tuple[str, ...], roots: list[Expr], result: str) -> str:
    lines, values = statements(CPP, roots)
    read = {x.args[0] for x in walk(*roots) if x.op == "param"}
    head = [f"const float {CPP.local(name)} = params[{i}];" for i, name in enumerate(parameters) if name in read]
    unused = [] if read else ["(void)params;"]
    body = [*unused, *head, *lines, "return " + result.format(", ".join(values)) + ";"]
    return f"RW_HD inline {signature}(const Leaves& t, const float* params) {{\n" + "".join(f"  {line}\n" for line in body) + "}\n"


def _switch(signature: str, prefix: str, names: list[str], otherwise: str) -> str:
    cases = "".join(f"    case {i}: return {prefix}_{name}(t, params);\n" for i, name in enumerate(names))
    return (
        f"RW_HD inline {signature} {{\n  switch ({prefix}) {{\n{cases}    default: (void)t; (void)params; return {otherwise};\n  }}\n}}\n"
    )


def _table(prefix: str, counts: dict[str, int]) -> str:
    names = ", ".join(f'"{name}"' for name in counts) or "nullptr"
    sizes = ", ".join(map(str, counts.values())) or "0"
    return (
        f"inline constexpr int k{prefix}Count = {len(counts)};\n"
        f"inline constexpr const char* k{prefix}Names[] = {{{names}}};\n"
        f"inline constexpr int k{prefix}ParamCounts[] = {{{sizes}}};\n"
    )


def rules_inc() -> str:
    """The text of ``rules.inc``. A rule's or weight's id is its position in the sorted names."""
    rules, weights = own_rules(), own_weights()
    out = [f"// {GENERATED}\n", '#include "math.h"\n', f"struct Leaves {{\n  float {', '.join(LEAVES)};\n}};\n"]
    out.append(f"struct RuleOut {{\n  float loss, {', '.join(f'd_{leaf}' for leaf in DIFFERENTIABLE_LEAVES)};\n}};\n")
    for name, cls in rules.items():
        traced = trace_rule(cls)
        out.append(_function(f"RuleOut rule_{name}", traced.parameters, [value(traced), *derive(traced).values()], "RuleOut{{{}}}"))
    for name, weight in weights.items():
        traced = trace_weight(weight)
        out.append(_function(f"float weight_{name}", traced.parameters, [value(traced)], "{}"))
    out.append(
        _switch(
            "RuleOut apply_rule(int rule, const Leaves& t, const float* params)",
            "rule",
            list(rules),
            "RuleOut{RW_NAN, RW_NAN, RW_NAN, RW_NAN, RW_NAN}",
        )
    )
    out.append(_switch("float apply_weight(int weight, const Leaves& t, const float* params)", "weight", list(weights), "RW_NAN"))
    out.append(
        "#if !defined(__CUDA_ARCH__)  // host only: what the ids mean\n"
        + _table("Rule", {name: len(cls.parameter_names()) for name, cls in rules.items()})
        + _table("Weight", {name: len(cls.parameter_names()) for name, cls in weights.items()})
        + "#endif\n"
    )
    return "\n".join(out)
