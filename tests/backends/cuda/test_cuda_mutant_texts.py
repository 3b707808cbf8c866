"""The planted bugs of test_cuda_mutants.py, without building them: each is still one
place of its source.
"""

import pytest
from paths import ROOT
from test_cuda_mutants import ALL_MUTANTS, FOUND_BY, IN_FP32

CUDA = ROOT / "csrc/cuda"


@pytest.mark.parametrize("file", sorted({file for file, _, _ in ALL_MUTANTS.values()}))
def test_a_bug_has_one_place_and_changes_it(file):
    source = (CUDA / file).read_text()
    own = {name: (text, bug) for name, (of, text, bug) in ALL_MUTANTS.items() if of == file}
    assert {name: source.count(text) for name, (text, _) in own.items()} == dict.fromkeys(own, 1)
    assert not [name for name, (text, bug) in own.items() if text == bug]


def test_every_bug_has_tests_that_must_find_it():
    assert FOUND_BY.keys() == ALL_MUTANTS.keys() and ALL_MUTANTS.keys() >= IN_FP32
