"""The functions on logits that trainers import by name: TRL 0.15 to 1.14, Axolotl
(``trl==1.9.0``) and ms-swift (``trl<1.0``).

``selective_log_softmax``, ``entropy_from_logits`` and, from TRL 1.14 on,
``selective_log_softmax_and_entropy`` are defined in ``trl.trainer.utils``, and each
trainer has them as attributes of its own module. :func:`patch_logits_functions`
replaces them there::

    import trl.trainer.grpo_trainer
    from reweight_ops.integrations.logits import patch_logits_functions

    # in every loaded module that has them from TRL
    with patch_logits_functions() as patch:
        trainer.train()
    # ms-swift
    patch_logits_functions("swift.rlhf_trainers.grpo_trainer")
    # Axolotl
    patch_logits_functions("axolotl.core.trainers.grpo.async_trainer")

Log-probs and entropies of 16-bit logits are fp32; TRL rounds them to the logits' dtype.
From TRL 1.15 on most trainers work from hidden states: see
:mod:`reweight_ops.integrations.trl`; ``trl.experimental``'s CPO, ORPO and TPO still
build logits.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._core.calls.dtensors import has_dtensors
from .._core.losses.statistics import token_logps, token_stats
from ..errors import BackendUnavailable, InvalidCall
from .patching import Counts, Patch, Replacement
from .trainers import check_version

#: The functions, with the leading parameters that each must have; any further one must
#: be optional.
_PARAMETERS = {
    "selective_log_softmax": ("logits", "index"),
    "entropy_from_logits": ("logits",),
    "selective_log_softmax_and_entropy": ("logits", "index"),
}

_HOME = "trl.trainer.utils"


class _Functions:
    """The replacements of one module's functions. ``originals`` are that module's, by
    name.
    """

    def __init__(
        self, backend: str, counts: Counts, originals: dict[str, Callable[..., Any]]
    ) -> None:
        self.backend = backend
        self.counts = counts
        self.originals = originals

    def selective_log_softmax(
        self,
        logits: Tensor,
        index: Tensor,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
        **new: Any,
    ) -> Tensor:
        """Return ``logits.log_softmax(-1)`` at ``index``, 0 where ``row_mask`` is 0."""
        given = _given(temperature, row_mask) | new
        reason = _unsupported_reason(logits, index, new)
        if reason is not None:
            self.counts.left(reason)
            return self.originals["selective_log_softmax"](logits, index, **given)  # type: ignore[no-any-return]
        self.counts.ran("token_logps")
        return _own(
            token_logps(
                logits,
                index,
                completion_mask=row_mask,
                temperature=temperature,
                backend=self.backend,
            )
        )

    def entropy_from_logits(self, logits: Tensor, chunk_size: int = 128, **new: Any) -> Tensor:
        """Return ``-Σ p·log p`` over the last dimension.

        ``chunk_size``, TRL's number of rows at a time, is not read, because no softmax
        is formed.
        """
        reason = _unsupported_reason(logits, None, new)
        if reason is not None:
            self.counts.left(reason)
            return self.originals["entropy_from_logits"](logits, chunk_size, **new)  # type: ignore[no-any-return]
        self.counts.ran("token_stats")
        any_token = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
        found = token_stats(logits, any_token, stats=("entropies",), backend=self.backend)
        return _own(found.entropies)

    def selective_log_softmax_and_entropy(
        self,
        logits: Tensor,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
        **new: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return both from one read of the logits, 0 where ``row_mask`` is 0."""
        given = _given(temperature, row_mask) | new
        reason = _unsupported_reason(logits, index, new)
        if reason is not None:
            self.counts.left(reason)
            original = self.originals["selective_log_softmax_and_entropy"]
            return original(logits, index, entropy_requires_grad, **given)  # type: ignore[no-any-return]
        self.counts.ran("token_logps")
        options: dict[str, Any] = {
            "completion_mask": row_mask,
            "temperature": temperature,
            "backend": self.backend,
        }
        logps, entropies = token_logps(logits, index, return_entropy=True, **options)
        return _own(logps), _own(entropies if entropy_requires_grad else entropies.detach())


def _given(temperature: float, row_mask: Tensor | None) -> dict[str, Any]:
    """Return the arguments that TRL before 1.14 does not have, if a
    caller gave them."""
    return ({} if temperature == 1.0 else {"temperature": temperature}) | (
        {} if row_mask is None else {"row_mask": row_mask}
    )


def _own(found: Any) -> Tensor:
    """Return a separate tensor. Trainers write zeros into the result, which autograd
    does not allow for a view that an op returns.
    """
    result: Tensor = found.clone()
    return result


def _unsupported_reason(logits: Tensor, index: Tensor | None, new: dict[str, Any]) -> str | None:
    """Return why TRL has to compute this, or None."""
    if new:
        return f"the arguments {', '.join(new)}"
    if has_dtensors([logits]):
        return "logits that are a DTensor"
    if index is not None and index.dim() == logits.dim():
        return "several tokens per position (top-k)"
    if logits.dim() < 2 or logits.stride(-1) != 1:
        return "logits whose last dimension is not contiguous, or the only one"
    return None


def _holders() -> list[ModuleType]:
    """Return every loaded module that has one of the functions from TRL."""
    home = sys.modules.get(_HOME)
    theirs = (
        {id(vars(home)[name]) for name in _PARAMETERS if name in vars(home)}
        if home is not None
        else set()
    )
    modules = [m for m in list(sys.modules.values()) if isinstance(m, ModuleType)]
    return [m for m in modules if any(id(vars(m).get(name)) in theirs for name in _PARAMETERS)]


def patch_logits_functions(*modules: ModuleType | str, backend: str = "auto") -> Patch:
    """Replace ``selective_log_softmax``, ``entropy_from_logits`` and
    ``selective_log_softmax_and_entropy`` in modules that have them.

    Args:
        modules: each a module, or its dotted name. None: every module loaded by now
            that has them from ``trl.trainer.utils``.
        backend: as in :func:`reweight_ops.token_logps`.

    Returns:
        A patch with ``undo()``, ``fused_calls`` and ``delegated_calls``, also a context
            manager.

    Raises:
        InvalidCall: a module has none of them, or they are patched already; none of the
            loaded modules has.
        BackendUnavailable: a module cannot be imported, or its functions are not the
            ones that are replaced here.
    """
    try:
        given = [
            importlib.import_module(m) if isinstance(m, str) else m for m in modules
        ] or _holders()
    except ImportError as error:
        raise BackendUnavailable(f"patch_logits_functions: {error}") from error
    if not given:
        raise InvalidCall(
            f"patch_logits_functions: no loaded module has {', '.join(_PARAMETERS)} from "
            f"{_HOME}: import your trainer first."
        )
    library = check_version("TRL by logits")
    counts = Counts("TRL")
    replacements = []
    for module in given:
        originals = {name: vars(module)[name] for name in _PARAMETERS if name in vars(module)}
        if not originals:
            raise InvalidCall(
                f"patch_logits_functions: {module.__name__} has none of {', '.join(_PARAMETERS)}."
            )
        functions = _Functions(backend, counts, originals)
        for name, original in originals.items():
            stand_in = functools.wraps(original)(functools.partial(getattr(functions, name)))
            replacements.append(Replacement(module, name, stand_in, _PARAMETERS[name]))
    return Patch(library, replacements, counts)
