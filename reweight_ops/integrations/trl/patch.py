"""The hooks in TRL's own classes and functions, until the patch is undone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from trl.trainer.grpo_trainer import GRPOTrainer

from ..._core.formula.base import TokenWeight
from ..._core.spec.policy import PolicyLossSpec
from ...errors import InvalidCall
from ..patching import Counts, Patch, Replacement
from .divergence import divergence_replacements
from .heads import head_replacements
from .hooks import Hooks, Options
from .library import LIBRARY, SIGNATURES
from .trainer import ReweightGRPOTrainer


def _grpo_replacements(options: Options, total: Counts) -> list[Replacement]:
    logps, loss = (getattr(GRPOTrainer, name) for name in SIGNATURES)

    def hooks(trainer: Any) -> Hooks:
        if "_reweight_hooks" not in trainer.__dict__:
            trainer._reweight_hooks = Hooks(trainer, options, loss, total)
        return trainer._reweight_hooks  # type: ignore[no-any-return]

    @functools.wraps(logps)
    def patched_logps(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        # reached through super(): it has its own hooks
        if isinstance(trainer, ReweightGRPOTrainer):
            return logps(trainer, *args, **kwargs)
        return hooks(trainer).token_logps(trainer, logps.__get__(trainer), *args, **kwargs)

    # a subclass of ours still finds by it whether it knows TRL's loss
    @functools.wraps(loss)
    def patched_loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> Any:
        if isinstance(trainer, ReweightGRPOTrainer):
            return loss(trainer, model, inputs)
        return hooks(trainer).loss(trainer, loss.__get__(trainer), model, inputs)

    functions = zip(SIGNATURES.items(), (patched_logps, patched_loss), strict=True)
    return [
        Replacement(GRPOTrainer, name, function, expected)
        for (name, expected), function in functions
    ]


def patch_trl(
    *,
    heads: bool = False,
    fuse_loss: bool = False,
    spec: PolicyLossSpec | str | Sequence[PolicyLossSpec | str] | None = None,
    reweight: TokenWeight | Sequence[TokenWeight] = (),
    backend: str = "auto",
    consume_logits: bool = False,
    lm_head: str = "auto",
) -> Patch:
    """Put the hooks of :class:`ReweightGRPOTrainer` into ``GRPOTrainer`` itself, for
    scripts that build it.

    ``heads=True`` replaces the head function that all of TRL's trainers share instead,
    and the divergence of its distillation trainer; it takes ``backend`` only. The two
    are independent: enter both patches for GRPO's hooks and the others' head.

    Returns a patch with ``undo()``, ``fused_calls`` and ``delegated_calls``, also a
    context manager. Subclasses that override a hooked method keep theirs. TRL's
    constructor still refuses an adapter on the head.

    Raises:
        InvalidCall: an option that ``heads=True`` does not read, or TRL is patched
            already.
        BackendUnavailable: TRL's functions are not the ones that are replaced here.
    """
    options = Options(fuse_loss, spec, reweight, backend, consume_logits, lm_head)
    total = Counts("TRL")
    if not heads:
        return Patch(LIBRARY, _grpo_replacements(options, total), total)
    ignored = [
        f.name
        for f in dataclasses.fields(options)
        if f.name != "backend" and getattr(options, f.name) != f.default
    ]
    if ignored:
        raise InvalidCall(
            f"patch_trl: heads=True does not read {', '.join(ignored)}, which are GRPO's: enter "
            "a second patch_trl(...) for them."
        )
    return Patch(
        LIBRARY,
        [*head_replacements(backend, total), *divergence_replacements(backend, total)],
        total,
    )
