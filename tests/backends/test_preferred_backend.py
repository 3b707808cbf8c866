"""Backends are tried in the order that the committed measurements favour."""

import json
import statistics

import pytest
import torch
from paths import ROOT

from reweight_ops._core.backends import preference
from reweight_ops._core.backends.preference import ORDER, kind_of
from reweight_ops._core.backends.select import candidates

#: The kernels of b5116b6: the providers of each backend, for rows that stay on chip and
#: for others.
ON_CHIP = {
    "cuda": ("cuda ring in place", "cuda stats", "cuda grad in place"),
    "triton": ("triton in place", "triton stats", "triton grad in place"),
}
OFF_CHIP = {"cuda": ("cuda streaming in place",), "triton": ("triton in place",)}


def medians():
    """The median time of each provider in every case of the file."""
    for case in json.loads((ROOT / "bench/results/h200-kernels.json").read_text())["cases"]:
        yield {
            result["provider"]: statistics.median(result["ms"])
            for result in case["results"]
            if result["ms"]
        }


def ratios(providers):
    """Times of ``cuda`` divided by those of ``triton``, for every case
    that has both."""
    for times in medians():
        for ours, theirs in zip(providers["cuda"], providers["triton"], strict=True):
            if ours in times and theirs in times:
                yield times[ours] / times[theirs]


@pytest.mark.parametrize("kind, providers", [("rows on chip", ON_CHIP), ("cuda", OFF_CHIP)])
def test_the_first_is_the_faster(kind, providers):
    found = sorted(ratios(providers))
    assert len(found) >= 12
    faster = "cuda" if statistics.geometric_mean(found) < 1 else "triton"
    assert ORDER[kind][0] == faster, found
    assert max(found) < 1.05 if faster == "cuda" else min(found) > 1, "and nowhere much slower"


@pytest.mark.parametrize(
    "capability, first",
    [
        ((8, 0), "triton"),
        ((8, 9), "triton"),
        ((9, 0), "cuda"),
        ((10, 0), "cuda"),
        ((12, 0), "triton"),
    ],
)
def test_a_gpu_is_asked_what_it_is(monkeypatch, capability, first):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    preference.kind_of.cache_clear()
    try:
        assert candidates(torch.device("cuda", 0))[0] == first
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert candidates(torch.device("cuda", 1))[0] == "triton"
    finally:
        preference.kind_of.cache_clear()


def test_without_a_gpu_nothing_is_asked():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert kind_of(torch.device("cuda", 0)) == "cuda" and kind_of(torch.device("meta")) == "meta"
    assert candidates(torch.device("meta")) == ("reference",)
