"""The table of ``make conformance``: agreement, known and unexpected differences, and
that it runs on installed peers.
"""

import math

import pytest
import torch
from conformance import table, trl_losses
from conformance.table import Case, Result, judged, lines


def gives(loss, *grads):
    return lambda: Result(torch.tensor(loss), tuple(torch.tensor(g) for g in grads))


OURS = gives(2.0, [1.0, -3.0])


def test_what_a_line_says():
    def line(theirs, because=""):
        found = judged(Case("peer", "options", theirs, OURS, because))
        return found.outcome, found.expected

    assert line(gives(2.0 + 1e-7, [1.0, -3.0])) == ("agrees", True)
    assert line(gives(2.01, [1.0, -3.0])) == ("differs because ?", False)
    assert line(gives(2.0, [1.0, -3.01]), "it rounds") == ("differs because it rounds", True)
    assert line(gives(math.nan, [1.0, -3.0])) == ("differs because ?", False)
    assert line(OURS, "it rounds") == (
        "agrees, though it was known to differ because it rounds",
        False,
    ), "what is known must stay true"

    def refuses():
        raise ValueError("no such option")

    assert line(refuses) == ("differs because it raises ValueError: no such option", False)


@pytest.mark.parametrize(
    "ours, message", [(gives(1.0, [math.nan]), "not finite"), (gives(1.0, [0.0]), "shows nothing")]
)
def test_our_own_failure_is_no_line(ours, message):
    with pytest.raises(AssertionError, match=message):
        judged(Case("peer", "options", OURS, ours))


def test_a_peer_that_is_not_there():
    def missing():
        raise ImportError("No module named 'peer'")
        yield

    (found,) = lines([("peer", missing)])
    assert found.outcome == "absent: No module named 'peer'" and found.expected
    assert table.text([found]).endswith("0 of 1 agree; 0 unexpected")


def test_it_runs_on_what_is_installed():
    pytest.importorskip("trl", minversion="1.16")
    cases = [
        case
        for case in (*trl_losses.losses(), *trl_losses.heads())
        if case.options in ("dapo token kl", "luspo sequence", "beta 0.3 softcap 5.0")
    ]
    found = [judged(case) for case in cases]
    assert [line.outcome for line in found] == ["agrees"] * 3, table.text(found)
