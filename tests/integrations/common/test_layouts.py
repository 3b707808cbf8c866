"""Packed sequences: which position predicts which token."""

import re

import pytest
import torch
from paths import ROOT

import reweight_ops as rw
from reweight_ops.integrations.layouts import packed, predicted, predicting


def test_packed():
    layout = packed([torch.tensor([5, 6, 7]), torch.tensor([8, 9])], [2, 1], 7)
    assert layout.targets.tolist() == [6, 7, -100, 9, -100, -100, -100]
    assert layout.sequence_ids.tolist() == [0, 0, 0, 1, 1, 2, 2] and layout.num_sequences == 2
    assert layout.rows.tolist() == [0, 1, 3]
    assert layout.spread([torch.tensor([1.0, 2.0]), torch.tensor([3.0])]).tolist() == [
        1,
        2,
        0,
        3,
        0,
        0,
        0,
    ]
    assert layout.gather(layout.targets).tolist() == [6, 7, 9]  # the responses


def test_a_sample_without_a_response():
    layout = packed([torch.tensor([5, 6]), torch.tensor([8, 9])], [0, 1], 4)
    assert layout.rows.tolist() == [2] and layout.spread(
        [torch.zeros(0), torch.ones(1)]
    ).tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize(("lengths", "length"), [([2, 1], 4), ([3, 1], 7)])
def test_what_does_not_fit(lengths, length):
    with pytest.raises(rw.InvalidCall, match="do not fit"):
        packed([torch.tensor([5, 6, 7]), torch.tensor([8, 9])], lengths, length)


def test_predicting():
    assert predicting(torch.arange(5)[None], 2).tolist() == [[2, 3]]


def test_predicted():
    assert predicted(torch.arange(5)[None]).tolist() == [[1, 2, 3, 4]]


def test_shifts_are_made_here_only():
    folder = ROOT / "reweight_ops" / "integrations"
    shift = re.compile(r"\[:, (1:|[^\]]*: ?-1\])|\.roll\(")
    assert [path.name for path in folder.rglob("*.py") if shift.search(path.read_text())] == [
        "layouts.py"
    ]
