"""The trainers with an integration: their versions, which of them were tested, and the
hook to use. This module imports none of them.
"""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from dataclasses import dataclass

from ..errors import InvalidCall


@dataclass(frozen=True)
class Trainer:
    """A trainer as its users know it.

    ``tested`` has the versions with which the parity tests passed, oldest first. All
    later ones up to the last are served. ``commit`` belongs to a trainer that is on no
    package index: the tests' transcription was made from it.
    """

    name: str
    distribution: str
    tested: tuple[str, ...]
    hook: str
    page: str
    commit: str = ""

    @property
    def installed(self) -> str | None:
        """Return the installed version, or None."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def standing(self, version: str) -> str:
        """Return in words how ``version`` compares with the tested ones."""
        if not self.tested:
            return f"compared with a transcription of {self.commit}"
        if version in self.tested:
            return "tested"
        if _numbers(version) > _numbers(self.tested[-1]):
            return "newer than any tested"
        return (
            "older than any tested"
            if _numbers(version) < _numbers(self.tested[0])
            else "between tested ones"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])


_HERE = "reweight_ops.integrations"

TRAINERS: dict[str, Trainer] = {
    t.name: t
    for t in (
        Trainer(
            "TRL",
            "trl",
            ("1.15.0", "1.16.0"),
            f"{_HERE}.trl: ReweightGRPOTrainer, patch_trl()",
            "docs/trainers/trl.md",
        ),
        Trainer(
            "TRL by logits",
            "trl",
            ("0.15.2", "0.29.0", "1.9.0", "1.14.2", "1.16.0"),
            f"{_HERE}.logits: patch_logits_functions() before 1.15, and for CPO, ORPO, TPO; "
            "Axolotl, ms-swift",
            "docs/trainers/logits.md",
        ),
        Trainer(
            "verl",
            "verl",
            ("0.9.1",),
            f"{_HERE}.verl: loss_mode=rw_<method>, adv_estimator=rw_<estimator>, "
            "patch_fused_linear()",
            "docs/trainers/verl.md",
        ),
        Trainer(
            "OpenRLHF",
            "openrlhf",
            ("0.11.2",),
            f"{_HERE}.openrlhf: patch(), PolicyLoss(spec)",
            "docs/trainers/openrlhf.md",
        ),
        Trainer(
            "slime, Miles",
            "slime",
            (),
            f"{_HERE}.slime.loss by --custom-loss-function-path",
            "docs/trainers/slime.md",
            "slime 624b824a",
        ),
        Trainer(
            "torchtitan RL",
            "torchtitan",
            (),
            f"{_HERE}.torchtitan: PolicyLoss.Config(method=)",
            "docs/trainers/torchtitan.md",
            "torchtitan b5bcd76c",
        ),
        Trainer(
            "prime-rl",
            "prime-rl",
            (),
            f"{_HERE}.prime_rl: loss by trainer.loss.import_path, patch_head()",
            "docs/trainers/prime_rl.md",
            "prime-rl 559b4477",
        ),
        Trainer(
            "NeMo-RL",
            "nemo-rl",
            (),
            f"{_HERE}.nemo_rl: PolicyLoss(master_config, spec)",
            "docs/trainers/nemo_rl.md",
            "NeMo-RL 7ea279ab",
        ),
        Trainer(
            "SkyRL",
            "skyrl",
            (),
            f"{_HERE}.skyrl: register(), then policy_loss_type=rw_<method>",
            "docs/trainers/skyrl.md",
            "SkyRL a9564572",
        ),
        Trainer(
            "AReaL",
            "areal",
            (),
            f"{_HERE}.areal: patch_logprobs(), patch_loss(spec)",
            "docs/trainers/areal.md",
            "AReaL 4aef98d8",
        ),
        Trainer(
            "Tinker",
            "tinker",
            ("0.38.0",),
            f"{_HERE}.tinker: custom_loss(spec)",
            "docs/trainers/tinker.md",
        ),
    )
}

_reported: set[str] = set()


def named(name: str) -> Trainer:
    """Return the trainer of this name."""
    if name not in TRAINERS:
        raise InvalidCall(f"no integration for {name!r}; there are: {', '.join(TRAINERS)}.")
    return TRAINERS[name]


def check_version(name: str) -> str:
    """Return the installed version of a trainer as ``"name version"``. A version newer
    than any tested warns once.
    """
    trainer = named(name)
    version = trainer.installed
    if version is None:
        return name
    if trainer.standing(version) == "newer than any tested" and name not in _reported:
        _reported.add(name)
        warnings.warn(
            f"{name} {version} is newer than any that reweight_ops was tested with "
            f"({trainer.tested[-1]}). "
            "What it replaces is checked by signature only.",
            stacklevel=3,
        )
    return f"{name} {version}"
