"""``explain``: which plan and backend a call takes, and why not the others. Runs nothing, accepts meta tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...errors import InvalidCall
from ..backends.base import Request
from ..backends.select import NAMES, load, why_not
from ..calls.keywords import all_options, head_options
from ..calls.logits import resolve_logits
from ..engine.plan import choose_plan, pick, target_of
from .policy import _POLICY_LOSS_OWN, _resolve, policy_loss, token_logps, token_stats


@dataclass(frozen=True)
class Explanation:
    """What a call would do: plan, backend, and why not the others; in one pass also the kernel, of a backend that has several."""

    plan: str
    backend: str
    why_not_one_pass: str | None
    backends: dict[str, str | None]
    kernel: str | None = None

    def __str__(self) -> str:
        lines = [
            f"plan: {self.plan}" + (f" (not one_pass: {self.why_not_one_pass})" if self.why_not_one_pass else ""),
            f"backend: {self.backend}" + (f", kernel: {self.kernel}" if self.kernel else ""),
        ]
        return "\n".join([*lines, *(f"  {name}: {'available' if reason is None else reason}" for name, reason in self.backends.items())])


def explain(op: Any, *args: Any, device: torch.device | str | None = None, **keywords: Any) -> Explanation:
    """What ``op(*args, **keywords)`` would do, for :func:`policy_loss`, :func:`token_logps` and :func:`token_stats`.

    ``device``: explain for that device instead of the tensors' own; with meta tensors the default is a GPU if there is one, else the CPU.

    >>> import torch, reweight_ops as rw
    >>> logits = torch.empty(2, 3, 8, device="meta", requires_grad=True)
    >>> rw.explain(rw.policy_loss, logits, torch.empty(2, 3, dtype=torch.long, device="meta"), 1.0, spec="gspo", device="cpu").plan
    'two_pass'
    """
    if op is policy_loss:
        own = {name: keywords.pop(name) for name in _POLICY_LOSS_OWN if name in keywords}
        options, data = all_options("policy_loss", keywords, _POLICY_LOSS_OWN)
        logits, ids, advantages = _positional(op, args, 3)
        call, head = _resolve(logits, ids, advantages, own.get("spec"), options, data)
        where = _device(head.logits, device)
        choice = choose_plan(call, target_of(head, where), own.get("plan", "auto"), own.get("differentiable_outputs", False))
        program, reason = call.spec.program, choice.why_not_one_pass
    elif op in (token_logps, token_stats):
        mask = keywords.pop("completion_mask", None)
        keywords = {name: value for name, value in keywords.items() if name not in ("stats", "return_entropy")}
        logits, ids = _positional(op, args, 2)
        head = resolve_logits(op.__name__, logits, ids, head_options(op.__name__, keywords), {"completion_mask": mask})
        where = _device(head.logits, device)
        choice = pick(where, head.logits.dtype, head.backend, None)
        program, reason = None, None
    else:
        raise InvalidCall("explain: expected policy_loss, token_logps or token_stats.")
    one_pass = choice.plan == "one_pass"
    request = Request("token_loss_grad" if one_pass else "token_stats", where, head.logits.dtype, program if one_pass else None)
    kernel_of = load(choice.backend).kernel_of if one_pass else None
    kernel = None if kernel_of is None else kernel_of(head.logits, head.vocab_size, where)
    return Explanation(choice.plan, choice.backend, reason, {name: why_not(name, request) for name in NAMES}, kernel)


def _positional(op: Any, args: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    if len(args) != count:
        raise InvalidCall(f"explain: {op.__name__} takes {count} positional arguments, got {len(args)}.")
    return args


def _device(logits: torch.Tensor, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    if logits.device.type == "meta":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return logits.device
