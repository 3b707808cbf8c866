"""New memory is on huge pages if the system has them, and otherwise always a plain
tensor.
"""

import os
from pathlib import Path

import pytest
import torch

from reweight_ops._core.engine import memory

CPU = torch.device("cpu")


def advised(address: int) -> bool:
    """Whether huge pages were requested at an address: the flag ``hg`` of
    its mapping."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(x, 16) for x in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return "hg" in line.split()
    raise LookupError(hex(address))


@pytest.fixture
def reported(monkeypatch, tmp_path):
    """The kernel's setting for free blocks that it reports to a host."""

    def say(text):
        monkeypatch.setattr(memory, "_REPORTED", tmp_path / "order")
        if text is not None:
            (tmp_path / "order").write_text(text)
        memory._huge_page.cache_clear()

    yield say
    memory._huge_page.cache_clear()


@pytest.mark.skipif(
    not memory._HUGE_PAGE.exists(), reason="this system has no transparent huge pages"
)
def test_whole_pages_inside_are_asked_for_and_nothing_else(reported):
    reported(None)
    page = memory._huge_page()
    # 16 pages have their own mapping, whatever the allocator holds
    out = memory.empty((4, page), torch.float32, CPU)
    begin, end = -(-out.data_ptr() // page) * page, (out.data_ptr() + out.nbytes) // page * page
    assert advised(begin) and advised(end - 1)
    for outside in (begin - 1, end):
        if out.data_ptr() <= outside < out.data_ptr() + out.nbytes:
            assert not advised(outside)
    if os.environ.get("THP_MEM_ALLOC_ENABLE") != "1":
        plain = torch.empty(16 * page, dtype=torch.uint8)
        assert not advised(plain.data_ptr() + 8 * page), (
            "plain memory also has the flag: this test shows nothing"
        )


@pytest.mark.skipif(
    not memory._HUGE_PAGE.exists(), reason="this system has no transparent huge pages"
)
@pytest.mark.parametrize(
    ("text", "asked"),
    [
        (None, True),
        ("-1\n", True),
        ("4294967295\n", True),
        ("no number", True),
        ("5\n", False),
        ("0\n", False),
    ],
)
def test_not_where_a_host_takes_free_memory_back(reported, text, asked):
    reported(text)
    assert (memory._huge_page() > 0) == asked


@pytest.mark.parametrize("shape", [(), (0, 7), (3, 5), (2, 3, 131)])
def test_small_ones_are_plain(shape, monkeypatch):
    monkeypatch.setattr(
        memory, "_libc", lambda: pytest.fail("less than a page must not request huge pages")
    )
    out = memory.empty(shape, torch.bfloat16, CPU)
    assert out.shape == shape and out.dtype == torch.bfloat16 and out.is_contiguous()


def test_without_huge_pages(monkeypatch):
    monkeypatch.setattr(memory, "_huge_page", lambda: 0)
    monkeypatch.setattr(memory, "_libc", lambda: pytest.fail("there is nothing to request"))
    assert memory.empty((1 << 22,), torch.float32, CPU).shape == (1 << 22,)
