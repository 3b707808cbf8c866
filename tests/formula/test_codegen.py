"""The table in C++ and the printed Triton equal fp64 autograd of the formula they come
from, value and every partial derivative.

The error bound is the running error bound of the very expression that was printed
(tests/support/running_error.py): the rounding of each of its fp32 operations, and
nothing else, may separate the generated code from the truth. Inputs and
hyper-parameters are fp32 numbers.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from built_in import own_rules, own_weights
from paths import ROOT
from running_error import FUNCTION_ULPS, evaluate

import reweight_ops.codegen as codegen
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import load as load_backend
from reweight_ops._core.backends.select import unsupported_reason
from reweight_ops._core.files import write_atomically
from reweight_ops._core.formula import triton
from reweight_ops._core.formula.base import DIFFERENTIABLE_FIELDS
from reweight_ops._core.formula.derive import derive, value
from reweight_ops._core.formula.loss_program import Program
from reweight_ops._core.formula.namespace import TorchNamespace
from reweight_ops._core.formula.printer import statements
from reweight_ops._core.formula.trace import trace_rule, trace_weight
from reweight_ops.rules import RULES, TOKEN_FIELDS, WEIGHTS, Rule, TokenWeight, rule, weight

XP = TorchNamespace(torch.float64)


# Every function and operator once, so that the printers are tested beyond what the
# package happens to use. Registered for this file only.
def _extra() -> tuple[type[Rule], type[TokenWeight]]:
    @rule("every_function")
    class EveryFunction(Rule):
        # together with the next: names that mean something else in the generated code
        adv_: float = 0.7
        lp: float = 1.5

        def loss(self, xp, t):
            a = xp.exp(t.log_ratio) * xp.log(1.5 - t.logp) + xp.tanh(self.adv_ * t.entropy) ** 3
            b = xp.log1p(xp.abs(t.log_sum_p_sq)) / (2 + xp.sigmoid(self.lp * t.logp)) - xp.expm1(
                xp.minimum(t.adv, 1.0)
            )
            c = xp.clip(a, -self.lp * t.entropy, xp.maximum(t.adv, t.entropy))
            choice = (
                ((a < b) | (t.adv >= 0.25)) & ~(t.entropy == 0) & (t.ref_logp != t.sampling_logp)
            )
            return xp.where(choice, a * b, c) + xp.stop_gradient(a) * t.logp

    @weight("every_leaf")
    class EveryLeaf(TokenWeight):
        a: float = 0.3

        def weight(self, xp, t, batch):
            unlikely = xp.exp(t.old_logp) + xp.exp(
                xp.clip(t.logp - t.sampling_logp, -5.0, 5.0)
            ) * xp.sigmoid(t.entropy - self.a)
            return xp.where(
                t.log_sum_p_sq < -1, unlikely, xp.minimum(t.log_ratio * t.ref_logp, t.adv)
            )

    return EveryFunction, EveryLeaf


@pytest.fixture(scope="module", autouse=True)
def formulas():
    """The package's own rules and weights and the two above, as one registry."""
    saved = dict(RULES), dict(WEIGHTS)
    extra = _extra()
    rules, weights = (
        {**own_rules(), "every_function": extra[0]},
        {**own_weights(), "every_leaf": extra[1]},
    )
    yield SimpleNamespace(rules=dict(sorted(rules.items())), weights=dict(sorted(weights.items())))
    for registry, content in zip((RULES, WEIGHTS), saved, strict=True):
        registry.clear()
        registry.update(content)


def points() -> dict[str, torch.Tensor]:
    """Leaves: random, and every place where a formula bends: no drift, no advantage,
    far outside each bound, the clamp itself.
    """
    g = torch.Generator().manual_seed(0)
    n = 4096

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=g)

    t = {
        "logp": uniform(-12, 0),
        "old_logp": uniform(-12, 0),
        "log_ratio": torch.randn(n, generator=g) * 0.4,
        "ref_logp": uniform(-12, 0),
    }
    t |= {
        "sampling_logp": uniform(-12, 0),
        "adv": torch.randn(n, generator=g),
        "entropy": uniform(0, 6),
        "log_sum_p_sq": uniform(-6, 0),
    }
    # small KL
    t["ref_logp"][::3] = t["logp"][::3] + 1e-3 * torch.randn(n, generator=g)[::3]
    t["log_ratio"][0:256] = 0.0
    t["adv"][128:512] = 0.0
    t["log_ratio"][512:640] = uniform(-3, -0.3)[512:640]  # below the lower bound
    t["log_ratio"][640:768] = uniform(0.3, 3)[640:768]  # above the upper one
    # as the kernels pass them: after the clamp of ±20
    raw = torch.tensor([-1e4, -100.0, -20.0, 20.0, 100.0, 1e4]).repeat(32)
    t["log_ratio"][768:960] = raw.clamp(-20, 20)
    # p = 0 in fp32, and a difference to the reference beyond the clamp of the penalties
    t["logp"][960:1024] = -100.0
    t["ref_logp"][1024:1088] = -100.0
    t["logp"][1088:1120] = t["ref_logp"][1088:1120] = 0.0
    t["entropy"][1088:1120] = 0.0
    return t


def truth(cls, params: dict[str, float]) -> list[torch.Tensor]:
    """fp64: a rule's loss and its derivatives by autograd, or a weight's value."""
    leaves = {k: v.double().requires_grad_(k in DIFFERENTIABLE_FIELDS) for k, v in points().items()}
    instance = cls(**params)
    if issubclass(cls, TokenWeight):
        return [instance.weight(XP, SimpleNamespace(**leaves), None).detach()]
    loss = instance.loss(XP, SimpleNamespace(**leaves))
    grads = torch.autograd.grad(
        loss.sum(),
        [leaves[k] for k in DIFFERENTIABLE_FIELDS],
        allow_unused=True,
        materialize_grads=True,
    )
    return [loss.detach(), *grads]


def default_params(cls) -> dict[str, float]:
    """The defaults (1/2 without one), rounded to fp32 as kernels receive them; clamp
    and cap finite too, so that both sides are seen.
    """
    required = {f.name: 0.5 for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    params = {k: torch.tensor(v).float().item() for k, v in cls(**required).parameters().items()}
    return params | {k: v for k, v in {"cap": 10.0, "delta": 2.0}.items() if k in params}


def assert_within_running_error(cls, got: torch.Tensor, params: dict[str, float]) -> None:
    traced = trace_weight(cls) if issubclass(cls, TokenWeight) else trace_rule(cls)
    roots = (
        [value(traced)]
        if issubclass(cls, TokenWeight)
        else [value(traced), *derive(traced).values()]
    )
    environment = {k: v.double() for k, v in points().items()} | {
        k: torch.tensor(v, dtype=torch.float64) for k, v in params.items()
    }
    outputs = ["value", *(f"d_{leaf}" for leaf in DIFFERENTIABLE_FIELDS)]
    for name, have, want, (_, bound) in zip(
        outputs, got, truth(cls, params), evaluate(roots, environment), strict=False
    ):
        assert have.isfinite().all(), (cls.name, name)
        excess = (have.double() - want).abs() - bound
        worst = int(excess.argmax())
        at = {k: v[worst].item() for k, v in points().items()}
        assert excess[worst] <= 0, (
            f"{cls.name}.{name}: {have[worst]} instead of {want[worst]}, bound {bound[worst]:.1e}, at {at}"
        )
        # The bound is tight: nearly everywhere it is a few hundred units in the last
        # place.
        tight = bound <= 2.0**-14 * (1 + want.abs())
        assert tight.double().mean() > 0.9, (cls.name, name)


# --- C++ ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """math.h, compiled by the host compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++ or clang++) on PATH")
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "host.cpp").write_text(
        """
        #include "common/math.h"
        extern "C" void run_math(int id, long n, const float* x, float* out) {
          for (long i = 0; i < n; ++i) {
            const float all[] = {rw_exp(x[i]), rw_expm1(x[i]), rw_log(x[i]), rw_log1p(x[i]), rw_sigmoid(x[i]), rw_tanh(x[i]),
                                 rw_min(x[i], 1.0f), rw_min(1.0f, x[i]), rw_max(x[i], 1.0f), rw_max(1.0f, x[i]),
                                 rw_clip(x[i], -1.0f, 1.0f), rw_abs(x[i])};
            out[i] = all[id];
          }
        }
        """
    )
    command = [
        compiler,
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        f"-I{ROOT}/csrc",
    ]
    subprocess.run([*command, "host.cpp", "-o", "host.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "host.so"))


def _pointer(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


@pytest.fixture
def evaluate_rows():
    if (
        unsupported_reason("cpu", Request("token_stats", torch.device("cpu"), torch.float32))
        is not None
    ):
        pytest.skip("the backend cpu is not there")
    return load_backend("cpu").evaluate_rows


def interpreted(
    evaluate_rows, program: Program, params: list[float], outputs: tuple[str, ...]
) -> torch.Tensor:
    """A program whose every factor is 1, on the points, by the table in C++."""
    one = torch.ones(1, points()["logp"].numel())
    return evaluate_rows(
        program, torch.tensor([-1.0, 1.0, 1.0, *params]), points(), one, outputs, None
    )


def test_cpp_rules(evaluate_rows, formulas):
    outputs = ("loss", *(f"d_{leaf}" for leaf in DIFFERENTIABLE_FIELDS))
    for cls in formulas.rules.values():
        params = default_params(cls)
        assert_within_running_error(
            cls, interpreted(evaluate_rows, Program.of((cls,)), [*params.values()], outputs), params
        )


def test_cpp_weights(evaluate_rows, formulas):
    one = rule("one")(type("One", (Rule,), {"loss": lambda self, xp, t: 0.0 * t.logp + 1.0}))
    for cls in formulas.weights.values():
        params = default_params(cls)
        program = Program.of((one,), ((cls, "all"),))
        assert_within_running_error(
            cls, interpreted(evaluate_rows, program, [*params.values()], ("loss",)), params
        )


# --- Triton (interpreter, or the GPU if there is one) ---------------------------------


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run_triton(cls, params: dict[str, float], folder: Path) -> torch.Tensor:
    pytest.importorskip("triton")
    is_weight = issubclass(cls, TokenWeight)
    name = f"{'weight' if is_weight else 'rule'}_{cls.name}"
    outputs = 1 if is_weight else 5
    loads = [f"tl.load(X + {j} * N + i)" for j in range(len(TOKEN_FIELDS))] + [
        f"tl.load(P + {j})" for j in range(len(params))
    ]
    traced = trace_weight(cls) if is_weight else trace_rule(cls)
    roots = [value(traced)] if is_weight else [value(traced), *derive(traced).values()]
    lines, values = statements(triton.TRITON, roots)
    arguments = [*TOKEN_FIELDS, *(triton.TRITON.local(p) for p in params)]
    lines = [f"{n} = {load}" for n, load in zip(arguments, loads, strict=True)] + lines
    source = [triton._HEADER, "from reweight_ops.triton_kernels import math\n"]
    source.append("@triton.jit\ndef kernel(X, P, O, N: tl.constexpr):\n    i = tl.arange(0, N)\n")
    source += [f"    {line}\n" for line in lines]
    for k in range(outputs):
        source.append(f"    tl.store(O + {k} * N + i, ({values[k]}) + tl.zeros([N], tl.float32))\n")
    (path := folder / f"generated_{name}.py").write_text("\n".join(source))
    x = torch.stack([points()[leaf] for leaf in TOKEN_FIELDS]).contiguous().to(DEVICE)
    out = torch.full((outputs, x.size(1)), float("nan"), device=DEVICE)
    p = torch.tensor([*params.values(), float("nan")], device=DEVICE)
    load(path).kernel[(1,)](x, p, out, N=x.size(1))
    return out.cpu()


def test_triton_rules(formulas, tmp_path):
    for cls in formulas.rules.values():
        params = default_params(cls)
        assert_within_running_error(cls, run_triton(cls, params, tmp_path), params)


def test_triton_weights(formulas, tmp_path):
    for cls in formulas.weights.values():
        params = default_params(cls)
        assert_within_running_error(cls, run_triton(cls, params, tmp_path), params)


# --- the functions --------------------------------------------------------------------

FUNCTIONS = ("exp", "expm1", "log", "log1p", "sigmoid", "tanh")
SPECIAL = [0.0, float("inf"), float("-inf"), float("nan"), 1.0, -1.0, 2.0, -2.0]


def arguments(function: str) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    n = 1 << 16
    sign = torch.where(torch.rand(n, generator=g) < 0.5, -1.0, 1.0)
    x = sign * torch.exp2(torch.rand(n, generator=g) * 46 - 40)
    near_one = 1 + 0.2 * torch.randn(n, generator=g)
    x = torch.cat([x, sign * near_one, 30 * torch.randn(n, generator=g)])
    if function == "log":
        x = torch.cat([x.abs(), torch.exp2(torch.rand(n, generator=g) * 250 - 126)])
    if function == "log1p":
        x = x[x > -1]
    return x[: 1 << 17].clamp(-80, 80) if function != "log" else x[: 1 << 18]


def math_in_cpp(library, function: str, x: torch.Tensor) -> torch.Tensor:
    order = (*FUNCTIONS, "min", "min_swapped", "max", "max_swapped", "clip", "abs")
    out = torch.empty_like(x)
    library.run_math(order.index(function), ctypes.c_long(x.numel()), _pointer(x), _pointer(out))
    return out


def math_in_triton(function: str, x: torch.Tensor, folder: Path) -> torch.Tensor:
    pytest.importorskip("triton")
    call = {
        "min": "minimum(x, 1.0)",
        "min_swapped": "minimum(1.0, x)",
        "max": "maximum(x, 1.0)",
        "max_swapped": "maximum(1.0, x)",
    }
    call |= {"clip": "clip(x, -1.0, 1.0)"}
    call = call.get(function, f"{function}(x)")
    body = f"    i = tl.arange(0, N)\n    x = tl.load(X + i, mask=i < n)\n    tl.store(O + i, math.{call}, mask=i < n)\n"
    (path := folder / f"math_{function}.py").write_text(
        f"{triton._HEADER}\nfrom reweight_ops.triton_kernels import math\n\n@triton.jit\ndef kernel(X, O, n, N: tl.constexpr):\n{body}"
    )
    source = x.to(DEVICE)
    out = torch.empty_like(source)
    load(path).kernel[(1,)](source, out, x.numel(), N=1 << (x.numel() - 1).bit_length())
    return out.cpu()


@pytest.fixture(params=["cpp", "triton"])
def run_math(request, tmp_path):
    if request.param == "triton":
        return lambda function, x: math_in_triton(function, x, tmp_path)
    library = request.getfixturevalue("library")
    return lambda function, x: math_in_cpp(library, function, x)


# numpy, inside Triton's interpreter
@pytest.mark.filterwarnings("ignore:invalid value|divide by zero|overflow:RuntimeWarning")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_are_as_accurate_as_the_bounds_assume(function, run_math):
    x = arguments(function)
    want = getattr(torch, function)(x.double())
    error = (run_math(function, x).double() - want).abs() / (want.abs() * 2.0**-24).clamp_min(
        2.0**-126
    )
    worst = int(error.argmax())
    assert error[worst] <= FUNCTION_ULPS, (
        f"{function}({x[worst].item()}) is wrong by {error[worst]:.1f} units of 2^-24"
    )
    special = torch.tensor(SPECIAL)
    got, torch_says = run_math(function, special), getattr(torch, function)(special)
    assert torch.allclose(got, torch_says, rtol=FUNCTION_ULPS * 2.0**-24, atol=0, equal_nan=True), (
        got,
        torch_says,
    )


@pytest.mark.parametrize("function", ["min", "min_swapped", "max", "max_swapped", "clip", "abs"])
def test_selection_propagates_nan_as_torch_does(function, run_math):
    x = torch.tensor(SPECIAL)
    one = torch.ones(())
    torch_says = {
        "min": torch.minimum,
        "max": torch.maximum,
        "clip": lambda x, _: x.clamp(-1, 1),
        "abs": lambda x, _: x.abs(),
    }[function.split("_")[0]](x, one)
    assert torch.equal(run_math(function, x).nan_to_num(99.0), torch_says.nan_to_num(99.0))


# --- the files ------------------------------------------------------------------------


def test_committed_files_are_fresh():
    assert codegen.stale_files() == [], "run python -m reweight_ops.codegen and commit the result"


def test_check_names_a_stale_file_and_writes_nothing(tmp_path, monkeypatch):
    for path, text in codegen.generated_files().items():
        write_atomically(tmp_path / path, text)
    assert codegen.stale_files(tmp_path) == []
    (tmp_path / "docs/methods.md").write_text("old")
    assert codegen.stale_files(tmp_path) == [Path("docs/methods.md")]
    assert not list(tmp_path.rglob(".*.py.*"))
