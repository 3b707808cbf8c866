"""Import paths of earlier layouts. Each fails with the name of its replacement."""

from __future__ import annotations

import importlib.abc
import sys
from types import ModuleType

_PACKAGE = __name__.split(".")[0]

#: Maps an old module to the new one, below the package.
MOVED = {
    "autograd": "_core.engine.autograd",
    "backends": "_core.backends",
    "backends.base": "_core.backends.base",
    "backends.cpu": "_core.backends.cpu",
    "backends.cuda": "_core.backends.cuda",
    "backends.native": "_core.backends.native",
    "backends.program": "_core.formula.program",
    "backends.reference": "_core.backends.reference",
    "backends.select": "_core.backends.select",
    "backends.triton": "_core.backends.triton",
    "backends.triton_programs": "_core.backends.triton_cache",
    "catalogue": "_core.catalogue",
    "catalogue.evaluate": "testing.golden",
    "catalogue.golden": "testing.golden_rows",
    "catalogue.left_out": "_core.catalogue.left_out",
    "catalogue.registry": "_core.catalogue.registry",
    "catalogue.table": "_core.catalogue.table",
    "checks": "testing.checks",
    "codegen.derive": "_core.formula.derive",
    "codegen.evaluate": "_core.formula.interpret",
    "codegen.printer": "_core.formula.printer",
    "codegen.trace": "_core.formula.trace",
    "codegen.triton": "_core.formula.triton",
    "coupling": "_core.spec.coupled",
    "divergences.chunks": "_core.engine.chunked_rows",
    "divergences.cpu": "_core.backends.cpu",
    "divergences.cuda": "_core.backends.cuda",
    "divergences.library": "_core.engine.ops",
    "divergences.native": "_core.backends.native_divergence",
    "divergences.ops": "_core.losses.distillation",
    "divergences.reference": "_core.backends.reference_divergence",
    "divergences.triton": "_core.backends.triton_divergence",
    "divergences.verbs": "_core.backends.base",
    "explain": "_core.losses.explain",
    "grouping": "_core.rows.grouped",
    "head": "_core.calls.logits",
    "integrations.trl_head": "integrations.trl.head",
    "integrations.trl_spec": "integrations.trl.spec",
    "keywords": "_core.calls.keywords",
    "library": "_core.engine.ops",
    "linear": "_core.losses.linear",
    "linear_gemms": "_core.engine.linear.gemms",
    "linear_head": "_core.engine.linear.autograd",
    "loss_call": "_core.calls.policy",
    "memory": "_core.engine.memory",
    "methods.parts": "methods.penalties",
    "methods.registry": "_core.calls.specs",
    "metrics": "_core.engine.metrics",
    "output": "_core.engine.output",
    "plans": "_core.engine.plan",
    "policy_loss": "_core.losses.policy",
    "preference.evaluate": "_core.engine.pairs",
    "preference.inputs": "_core.calls.pairs",
    "preference.ops": "_core.losses.preference",
    "preference.parts": "_core.spec.pair_parts",
    "preference.spec": "_core.spec.pairs",
    "preference.view": "_core.rows.pairs",
    "ratio": "_core.spec.ratio",
    "reduction": "_core.spec.reduction",
    "rows": "_core.rows.rows",
    "rules.base": "_core.formula.base",
    "rules.namespace": "_core.formula.namespace",
    "sources": "_core.backends.sources",
    "spec": "_core.spec.policy",
    "terms": "_core.formula.terms",
    "testing_pairs": "testing.pairs",
    "weights.batch": "_core.rows.batch",
}


class _Moved(importlib.abc.MetaPathFinder):
    """A finder that comes last, so it sees only modules that no other finder knows."""

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> None:
        new = MOVED.get(name.removeprefix(f"{_PACKAGE}."))
        if new is not None and name.startswith(f"{_PACKAGE}."):
            raise ModuleNotFoundError(
                f"{name} is now {_PACKAGE}.{new}. Names without an underscore are in {_PACKAGE} "
                "itself.",
                name=name,
            )


def install() -> None:
    """Once a process."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
