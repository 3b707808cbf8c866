"""Trainers of ``trl.experimental``: those that build logits by
``patch_logits_functions()``, a subclass of GRPO's by ``patch_trl(heads=True)``.
Offline, CPU.
"""

import importlib

import pytest

pytest.importorskip("trl", minversion="1.15")

from datasets import Dataset
from test_trl_heads import COMMON, PAIRS, model, on_policy
from test_trl_heads_training import trained
from trl_common import make_tokenizer

from reweight_ops.integrations.logits import patch_logits_functions
from reweight_ops.integrations.trl import patch_trl

# that they are experimental; tokenizers
pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ("CPO", "ORPO", "TPO")


def experimental(name):
    module = importlib.import_module(f"trl.experimental.{name.lower()}")
    return getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")


def build(name):
    kind, config = experimental(name)

    def preference(out, **settings):
        rows = Dataset.from_list(
            [{**row, "reference": row["chosen"]} if name == "TPO" else row for row in PAIRS]
        )
        return kind(
            model=model(),
            args=config(output_dir=out, **(COMMON | settings)),
            train_dataset=rows,
            processing_class=make_tokenizer(),
        )

    return preference


def assert_same_training(stock, ours):
    assert stock[0].norm() > 1e-2
    assert (ours[0] - stock[0]).norm() <= 1e-6 * stock[0].norm()
    for theirs, mine in zip(stock[1], ours[1], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("name", NAMES)
def test_trainers_that_build_logits(name, tmp_path):
    """Two steps, stock and patched, lead to the same parameters."""
    trainer = build(name)
    stock = trained(trainer, str(tmp_path / "stock"))
    with patch_logits_functions() as patch:
        ours = trained(trainer, str(tmp_path / "ours"))
    assert_same_training(stock, ours)
    assert patch.fused_calls == {"token_logps": 2} and patch.delegated_calls == {}


def test_a_subclass_of_grpo(tmp_path):
    trainer = on_policy(*experimental("GMPO"))
    stock = trained(trainer, str(tmp_path / "stock"))
    with patch_trl(heads=True) as patch:
        ours = trained(trainer, str(tmp_path / "ours"))
    assert_same_training(stock, ours)
    assert patch.fused_calls["linear_token_stats"] >= 2 and patch.delegated_calls == {}
