"""What ``import reweight_ops`` costs beyond ``import torch``: in modules and in calls,
which are the same on every machine, and not in seconds.
"""

import subprocess
import sys

from paths import ROOT

#: The maximum of functions of Python that the import runs, without the import system's
#: own. With Python 3.11 it runs 180,400.
CALLS = 184_000


def in_a_new_process(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout.split()


NEW_MODULES = """
import sys, torch
before = set(sys.modules)
import reweight_ops as rw
{then}
names = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(names - sys.stdlib_module_names))
"""

#: Calls from logits, from hidden states, of pairs and of a teacher, backward included.
CALLS_OF_OPS = """
ids = torch.zeros(2, 3, dtype=torch.long)
logits, hidden = (torch.zeros(2, 3, 8, requires_grad=True) for _ in range(2))
for backend in ("auto", "reference"):
    for plan in ("one_pass", "two_pass"):
        out = rw.policy_loss(
            logits, ids, torch.ones(2), spec="grpo", plan=plan, backend=backend
        )
        out.loss.backward()
        out.metrics.sums
    rw.linear_policy_loss(
        hidden, torch.zeros(8, 8), ids, torch.ones(2), spec="gspo", backend=backend
    ).loss.backward()
    rw.preference_loss(logits, ids, spec="simpo", backend=backend).loss.backward()
    rw.distillation_loss(
        logits, torch.zeros(2, 3, 8), kind="forward_kl", backend=backend
    ).loss.backward()
"""


def test_the_import_loads_nothing_that_torch_does_not_load():
    """No sympy, no torch._dynamo: they take longer than everything else. The first call
    does not load them either.
    """
    assert in_a_new_process(NEW_MODULES.format(then="")) == ["reweight_ops"]
    assert in_a_new_process(NEW_MODULES.format(then=CALLS_OF_OPS)) == ["reweight_ops"]


def test_the_import_runs_little_python():
    code = """
import sys, torch
calls = 0
def count(frame, event, argument):
    global calls
    calls += event == "call" and "importlib" not in frame.f_code.co_filename
sys.setprofile(count)
import reweight_ops
sys.setprofile(None)
print(calls)
"""
    (calls,) = in_a_new_process(code)
    assert int(calls) <= CALLS
