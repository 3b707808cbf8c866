"""The code of a GPU, compiled without one: no spills, 16-byte loads and stores, no
needless compilation.

Each test starts a separate process (tests/support/aot.py): Triton decides at import
whether it interprets or compiles.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from paths import ROOT

pytest.importorskip("triton")

import triton

from reweight_ops.triton_kernels.config import config_for
from reweight_ops.triton_kernels.row_config import VARIANTS

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950")
#: What a processor of an H200 needs: 4.3 TB/s, 0.8 us, 132 processors.
BYTES_IN_FLIGHT = 4.3e12 * 0.8e-6 / 132
#: The least number of 16-byte loads and stores in each kernel's loops over full tiles.
WHOLE_ROWS = {"stats_kernel": (1, 0), "gradient_kernel": (1, 1), "loss_grad_kernel": (2, 1)}
SPLIT_ROWS = {"partial_kernel": (1, 0), "gradient_kernel": (1, 1), "loss_grad_kernel": (1, 1)}


@pytest.fixture(scope="module")
def aot(tmp_path_factory):
    """Runs tests/support/aot.py and returns its output."""
    folder = tmp_path_factory.mktemp("aot")
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "REWEIGHT_OPS_CACHE": str(folder / "ours"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment.pop("TRITON_INTERPRET", None)

    def run(*arguments: str):
        command = [sys.executable, str(ROOT / "tests/support/aot.py"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


def assert_sound(compiled: list[dict], streaming: dict[str, tuple[int, int]]) -> None:
    assert compiled
    for kernel in compiled:
        assert kernel["spilled"] == 0, kernel
        loads, stores = streaming.get(kernel["kernel"], (0, 0))
        assert kernel["wide_loads"] >= loads, kernel
        assert kernel["wide_stores"] >= stores, kernel


def some_slow(*usual):
    """Half a minute of a core for a target: the others run with the slow tests."""
    return [
        target if target in usual else pytest.param(target, marks=pytest.mark.slow)
        for target in TARGETS
    ]


@pytest.mark.parametrize("target", some_slow("sm_90", "gfx942"))
def test_every_primitive_and_dtype_compiles_without_spills_and_streams_16_bytes_at_a_time(
    aot, target
):
    compiled = aot("compile", target)
    assert {(k["kernel"], k["dtype"]) for k in compiled} == {
        (kernel, dtype)
        for kernel in ("stats_kernel", "gradient_kernel", "loss_grad_kernel")
        for dtype in ("bfloat16", "float16", "float32")
    }
    assert_sound(compiled, WHOLE_ROWS)


@pytest.mark.parametrize("target", some_slow("sm_90"))
def test_variants_compile(aot, target):
    """Split rows, a softcap, and unaligned rows: the latter may load narrowly, but do
    not spill.
    """
    compiled = aot("variants", target)
    assert {"partial_kernel", "merge_kernel", "gradient_kernel"} <= {k["kernel"] for k in compiled}
    assert_sound([k for k in compiled if k["dtype"] == "bfloat16"], SPLIT_ROWS)
    assert_sound([k for k in compiled if k["dtype"] == "float32"], {})


@pytest.mark.parametrize("target", some_slow("sm_90"))
def test_rows_at_any_address_are_loaded_and_stored_16_bytes_at_a_time(aot, target):
    """V = 50257, in place and to gradients that begin elsewhere: vectors of those are
    cut out of two.
    """
    compiled = aot("unaligned", target)
    names = [k["kernel"] for k in compiled]
    assert sorted(names) == sorted(["stats_kernel", *["gradient_kernel", "loss_grad_kernel"] * 2])
    whole = {"stats_kernel": (8, 0), "gradient_kernel": (4, 4), "loss_grad_kernel": (12, 4)}
    assert_sound(compiled, whole)


@pytest.mark.parametrize(
    ("target", "task", "vocab"),
    [
        ("sm_90", "apart in bf16", 4001),
        ("sm_90", "apart in bf16", 50257),
        *[
            pytest.param(target, "apart", vocab, marks=pytest.mark.slow)
            for target in TARGETS
            for vocab in (4001, 4099, 50257)
        ],
    ],
)
def test_gradients_that_begin_elsewhere_than_aligned_logits(aot, target, task, vocab):
    """Padded logits are aligned, and rows of an odd number of columns are not: each
    vector of the gradient is cut out of two. Each V has a line of the default table.
    """
    compiled = aot(f"{task} {vocab}", target)
    dtypes = sorted({k["dtype"] for k in compiled})
    assert dtypes == (["bfloat16"] if "bf16" in task else ["bfloat16", "float16", "float32"])
    assert len(compiled) == 2 * len(dtypes)
    for dtype in dtypes:
        config = config_for(vocab, 4 if dtype == "float32" else 2)
        both, vectors = config.vectors, config.grad_vectors
        whole = {"gradient_kernel": (2 * vectors, vectors), "loss_grad_kernel": (3 * both, both)}
        assert_sound([k for k in compiled if k["dtype"] == dtype], whole)


@pytest.fixture(scope="module")
def whole_tiles(aot):
    """The loops over whole tiles in the code for Hopper."""
    found = aot("loops", "sm_90")
    assert [(x["kernel"], x["sweep"]) for x in found] == [
        ("stats_kernel", "statistics"),
        ("gradient_kernel", "gradient"),
        ("loss_grad_kernel", "statistics"),
        ("loss_grad_kernel", "gradient"),
    ]
    assert all(loop["logits"] == 32 for loop in found)
    return found


@pytest.mark.skipif(
    tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 9),
    reason="before Triton 3.9 loads come later, and the one pass has 312 instructions for 32",
)
def test_loads_come_early_and_logits_cost_few_instructions(whole_tiles):
    """The compiler could put the next tile's loads after this tile's arithmetic, and
    did so with eight vectors per tile.
    """
    for loop in whole_tiles:
        # The gradient primitive has all four derivatives here, and holds them with its
        # tiles.
        assert (
            loop["loads"][-1]
            < (0.5 if loop["kernel"] == "gradient_kernel" else 0.25) * loop["instructions"]
        ), loop
        assert loop["instructions"] <= 9.7 * loop["logits"], loop


def test_loops_have_bytes_in_flight_and_time_for_their_instructions(whole_tiles):
    """With any Triton. A load is in flight from its place in the loop to the end of the
    last iteration before its tile is used. An H200 needs 26 KiB a processor, and a
    processor issues 13.8 instructions a logit at the limit of reads (bench/NOTES.md).
    """
    config = config_for(151936, 2)
    for loop in whole_tiles:
        launch = {"stats_kernel": config.stats, "gradient_kernel": config.grad}.get(
            loop["kernel"], config.one_pass
        )
        ahead = launch.ahead if loop["sweep"] == "statistics" else 1
        places = [ahead - place / loop["instructions"] for place in loop["loads"]]
        assert launch.programs() * launch.threads * 16 * sum(places) >= BYTES_IN_FLIGHT, loop
        assert loop["instructions"] <= 13.8 * loop["logits"], loop


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_shape_compiles_without_spills(aot, target):
    """Also the shapes that a benchmark can choose."""
    assert_sound(aot("shapes", target), {})


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_scaling_compiles_twice_a_dtype_and_streams_16_bytes_at_a_time(aot, target):
    """Once for gradients without gaps and once for others. Four loads and four stores
    are what a thread has in flight.
    """
    compiled = aot("scales", target)
    assert sorted(k["dtype"] for k in compiled) == sorted(["bfloat16", "float16", "float32"] * 2)
    assert_sound(compiled, {"scale_kernel": (4, 4)})


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_kernels_on_rows_compile_without_spills(aot, target):
    """Once for each option, for all lengths of sequences: four row weights, two of a
    token weight and two of both, three evaluations, two sums, two ratios (the drifts
    clipped or not), and the prompts of padded and of packed rows; four statistics and
    one of a number; two quantiles; four sums along sequences; two centred ratios; four
    reductions of prompts, given in two ways, and a hinge. Those that know sequences do
    so once for each of the three ways in which these are given.
    """
    compiled = aot("rows", target)
    names = [k["kernel"] for k in compiled]
    assert {name: names.count(name) for name in names} == {
        "mask_kernel": 1,
        "pack_kernel": 2,
        "regroup_kernel": 2,
        "measure_kernel": 3,
        "spread_kernel": 1,
        "weigh_kernel": 16,
        "ratio_kernel": 6,
        "adjoint_kernel": 6,
        "sequence_total_kernel": 15,
        "parts_kernel": 5,
        "total_kernel": 4,
        "quantile_kernel": 2,
        "along_kernel": 12,
        "prefix_kernel": 3,
        "prefix_adjoint_kernel": 1,
        "moments_kernel": 1,
        "centre_kernel": 2,
        "centre_adjoint_kernel": 1,
        "sequence_sums_kernel": 3,
        "join_kernel": 9,
        "contributions_kernel": 8,
        "evaluate_kernel": 3,
        "sums_kernel": 5,
        "metrics_kernel": 2,
    }
    assert_sound(compiled, {})
    # there may be a program for each of 2^28 sequences
    assert {k["kernel"] for k in compiled if k["narrow"]} == set()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_on_rows_compile_without_spills_in_every_table_of_sizes(aot, target):
    """Also the tables that a benchmark can choose. The default one stands first."""
    compiled = aot("row tables", target)
    assert len(compiled) % len(VARIANTS) == 0 and next(iter(VARIANTS)) == "default"
    assert_sound(compiled, {})


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_packed_rows_compile_without_spills(aot, target):
    """Twice per dtype, for few statistics or all, and twice more with a softcap."""
    compiled = aot("packed", target)
    names = [(k["kernel"], k["dtype"]) for k in compiled]
    assert {name: names.count(name) for name in names} == {
        (kernel, dtype): 4
        for kernel in ("packed_stats_kernel", "packed_gradient_kernel")
        for dtype in ("bfloat16", "float16", "float32")
    }
    assert_sound(compiled, {})


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_the_search_of_ids_compiles_without_spills(aot, target):
    """Once for each room of 256, 512 and 1024 keys. Its sorts take half a minute to
    compile.
    """
    compiled = aot("top", target)
    dtypes = [k["dtype"] for k in compiled]
    assert {name: dtypes.count(name) for name in dtypes} == {
        "bfloat16": 6,
        "float16": 3,
        "float32": 3,
    }
    assert_sound(compiled, {"top_stats_kernel": (1, 0)})


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_spill_gate_fires(aot, target):
    """The negative control: with tiles that are far too large, the same measurement
    reports spills.
    """
    assert any(kernel["spilled"] > 0 for kernel in aot("oversized", target))


def test_nothing_recompiles_that_need_not(aot):
    """Temperature, hyper-parameters, softcap, N, lengths, strides, V, a temperature per
    row, on-policy or not, the rows' addresses.
    """
    counts = aot("count")
    assert counts == {"gradient_kernel": 1, "loss_grad_kernel": 1, "stats_kernel": 1}


def test_what_is_timed_was_compiled_ahead(aot):
    """What meta tensors ask for is what the jobs' own tensors ask for."""
    (found,) = aot("ahead", "sm_90")
    assert found["ahead"] >= 6 and found["later"] == 0
