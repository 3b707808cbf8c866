"""verl (0.9) on our ops: every method as a ``loss_mode``, advantage estimators as
``adv_estimator``, and the fused linear head.

verl loads the plugin by itself (entry point ``verl.plugins``), so a configuration needs
only the name::

    actor_rollout_ref.actor.policy_loss.loss_mode=rw_dapo algorithm.adv_estimator=rw_qae

Another spec gets a name in a module that ``VERL_USE_EXTERNAL_MODULES`` lists::

    from reweight_ops.integrations.verl import register
    register({"mine": rw.methods.dapo(epsilon_high=0.3)})

``patch_fused_linear()`` in the same place computes log-probs and entropies from hidden
states (``use_fused_kernels=True``, ``impl_backend=torch``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..._core.calls.specs import METHODS
from ..._core.catalogue.registry import CATALOGUE
from ..._core.losses.linear import linear_token_logps
from ..._core.spec.policy import PolicyLossSpec
from ...errors import BackendUnavailable
from ..patching import Counts, Patch, Replacement, check_signature
from ..sharding import is_sharded, unsupported_reason, whole
from ..trainers import check_version
from .advantages import entry_unsupported_reason, estimator_fn
from .losses import loss_fn, method_unsupported_reason

try:
    from verl.trainer.ppo import core_algos
    from verl.utils.experimental import torch_functional
except ImportError as error:
    raise BackendUnavailable(
        f"reweight_ops.integrations.verl needs verl: pip install 'verl>=0.9' ({error})"
    ) from error

#: The installed version, for messages.
LIBRARY = check_version("verl")
check_signature(LIBRARY, core_algos, "register_policy_loss", ("name",))

check_signature(LIBRARY, core_algos, "register_adv_est", ("name_or_enum",))

__all__ = [
    "estimator_fn",
    "left_out",
    "left_out_advantages",
    "loss_fn",
    "patch_fused_linear",
    "register",
    "register_advantages",
]


def register(specs: Mapping[str, PolicyLossSpec] | None = None) -> tuple[str, ...]:
    """Put losses into verl's registry and return their names: ``specs`` by the names
    given, or every method that verl can train as ``rw_<method>``.

    Raises:
        UnsupportedRequest: verl cannot train one of ``specs``; the reason is named.
    """
    if specs is None:
        specs = {
            f"rw_{name}": entry.build()
            for name, entry in METHODS.items()
            if method_unsupported_reason(entry) is None
        }
    # all of them, before the first is registered
    functions = {name: loss_fn(spec) for name, spec in specs.items()}
    for name, function in functions.items():
        core_algos.register_policy_loss(name)(function)
    return tuple(functions)


def left_out() -> dict[str, str]:
    """Return the methods that :func:`register` leaves out, each with the reason."""
    reasons = {name: method_unsupported_reason(entry) for name, entry in METHODS.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def register_advantages(
    estimators: Mapping[str, Callable[..., Any]] | None = None,
) -> tuple[str, ...]:
    """Put advantage estimators into verl's registry and return their names:
    ``estimators`` by the names given, or every one of ``rw.advantages`` that verl can
    call as ``rw_<estimator>``, with its own defaults. ``functools.partial`` sets
    others.

    Raises:
        UnsupportedRequest: verl does not hand over what one of ``estimators`` needs;
            the reason is named.
    """
    if estimators is None:
        estimators = {
            f"rw_{n}": entry.function
            for n, entry in CATALOGUE["advantage"].items()
            if entry_unsupported_reason(entry) is None
        }
    functions = {name: estimator_fn(name, estimator) for name, estimator in estimators.items()}
    for name, function in functions.items():
        known = core_algos.ADV_ESTIMATOR_REGISTRY.get(name)
        # the plugin has registered it already
        if getattr(known, "estimator", None) is not estimators[name]:
            core_algos.register_adv_est(name)(function)
    return tuple(functions)


def left_out_advantages() -> dict[str, str]:
    """Return the estimators that :func:`register_advantages` leaves out, each with the
    reason.
    """
    reasons = {
        name: entry_unsupported_reason(entry) for name, entry in CATALOGUE["advantage"].items()
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def patch_fused_linear(*, backend: str = "auto") -> Patch:
    """Replace ``FusedLinearForPPO.forward``, which every fused model of verl's torch
    backend calls.

    ``temperature`` may be a tensor with one number per row, where verl takes one for
    all. Entropies are fp32 for any dtype of hidden states, and
    both results have gradients, per row. Returns a patch with ``undo()``,
    ``fused_calls`` and ``delegated_calls``, also a context manager.

    Raises:
        BackendUnavailable: verl's function is not the one that is replaced here.
    """
    counts = Counts("verl")
    original = torch_functional.FusedLinearForPPO.forward

    def forward(
        self: Any, hidden_states: Any, vocab_weights: Any, input_ids: Any, temperature: Any = 1.0
    ) -> Any:
        reason = unsupported_reason(vocab_weights) if is_sharded(vocab_weights) else None
        if reason is not None:
            counts.left(f"a head that is a DTensor: {reason}")
            return original(self, hidden_states, vocab_weights, input_ids, temperature)
        counts.ran("linear_token_logps")
        options: dict[str, Any] = {
            "temperature": temperature,
            "backend": backend,
            "return_entropy": True,
        }
        return linear_token_logps(
            hidden_states, whole(vocab_weights, hidden_states.dtype), input_ids.long(), **options
        )

    parameters = ("self", "hidden_states", "vocab_weights", "input_ids", "temperature")
    return Patch(
        LIBRARY,
        [Replacement(torch_functional.FusedLinearForPPO, "forward", forward, parameters)],
        counts,
    )
