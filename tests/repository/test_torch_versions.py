"""The oldest PyTorch that an installation may have is one that ``make torch-versions``
runs, and so is its Triton.
"""

import re

from paths import ROOT

from reweight_ops._core.backends.triton_launch import TESTED


def numbers(variable):
    listed = re.search(rf"^{variable} \?= (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    return [tuple(map(int, version.split(".")[:2])) for version in listed]


def test_the_floor_is_the_first_that_is_run():
    floor = re.search(
        r'^dependencies = \["torch>=([\d.]+)"\]', (ROOT / "pyproject.toml").read_text(), re.M
    )[1]
    versions = numbers("TORCHES")
    assert versions == sorted(versions) and tuple(map(int, floor.split("."))) == versions[0]


def test_triton_likewise():
    assert (numbers("TRITONS")[0], numbers("TRITONS")[-1]) == TESTED
