"""``make gpu-kernels`` without a GPU: its script and variants, emulated and
interpreted, compiled, and what it refuses.
"""

import itertools
import json
import os
import shutil

import pytest
import torch
from cuda_emulation.build import compiler
from launches import Counted, NoHostCopies
from paths import ROOT

from bench import (
    gpu_divergence,
    gpu_kernels,
    gpu_rows,
    gpu_search,
    gpu_variants,
    triton_shapes,
)
from reweight_ops.triton_kernels import row_config


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler to build the emulated kernels")
def test_the_dry_run(tmp_path, capsys):
    """Two variants by name, of the kernels on one tensor and on two. Each gives the
    bits of the released defaults, in shapes for the ring and the streaming kernel.
    """
    pytest.importorskip("pybind11")
    arguments = [
        "--dry-run",
        "--out",
        str(tmp_path),
        "more=RING_DIRECT=1 RING_ROWS_AHEAD=2",
        "unsure=DIVERGENCE_SURE=0",
    ]
    assert gpu_kernels.main(arguments) == 0
    found = json.loads((tmp_path / "gpu-kernels.json").read_text())
    assert list(found["variants"]) == ["shipped", "more", "unsure"] and found["left_out"] == []
    jobs = {
        "one pass",
        "one pass +entropy",
        "one pass, streaming",
        "statistics",
        "statistics +entropy",
        "statistics +ids",
        "gradient",
    }
    for shape in found["shapes"]:
        assert shape["wrong"] == {} and set(shape["fractions"]) == {
            "shipped: statistics, then ids",
            *(f"{name}: {job}" for name in ("shipped", "more") for job in jobs),
        }
        assert all(len(ms) == 1 for ms in shape["ms"].values())
    for shape in found["two_tensors"]:
        assert shape["wrong"] == {} and set(shape["fractions"]) == {
            f"{name}, {kernel} rows: divergence{job}"
            for kernel in ("whole", "split")
            for name, job in (
                ("shipped", ", sure rows"),
                *itertools.product(("shipped", "unsure"), ("", ", gradient", ", both")),
            )
        }
    said = capsys.readouterr().out
    assert "more: one pass +entropy" in said and "unsure, split rows: divergence, both" in said


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler to build the emulated kernels")
def test_without_the_second_sum_only_sure_rows_have_other_bits():
    pytest.importorskip("pybind11")
    made = gpu_kernels.emulated({"shipped": "", "unsure": "DIVERGENCE_SURE=0"})
    pairs = gpu_divergence.Pairs.make(1, 1027, "cpu")
    jobs = [pairs.jobs(gpu_divergence.NativeDivergence(native)) for _, native in made.values()]
    for what in jobs[0]:
        got, want = (pairs.outcome(of[what][1]) for of in jobs)
        assert gpu_divergence.same_bits(got, want) == (what != gpu_divergence.SURE), what


@pytest.mark.parametrize("planted", ["table", "gradient", "NaN"])
def test_two_tensors_with_other_numbers_are_wrong(planted):
    """Triton's kernel is held to the criterion, here by fp32 PyTorch in its place."""
    reference = gpu_kernels.select.load("reference")
    pairs = gpu_divergence.Pairs.make(3, 1027, "cpu")
    few = pairs.some(torch.float32)
    for what in ("divergence", "divergence, sure rows", "divergence, gradient", "divergence, both"):
        got = few.outcome(few.jobs(reference)[what][1])
        got[0] = got[0].to(torch.bfloat16)
        assert gpu_divergence.error(pairs, what, got) <= 1, what
        if planted == "gradient" and what in ("divergence, gradient", "divergence, both"):
            got[0][1] *= 1.02
        elif planted != "gradient" and len(got) == 2:
            got[1][0, 2] = float("nan") if planted == "NaN" else got[1][0, 2] + 1e-3
        else:
            continue
        assert not gpu_divergence.error(pairs, what, got) <= 1, what


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler to build the emulated kernels")
def test_triton_beside_cuda(monkeypatch, tmp_path):
    """A table of launch shapes is timed if its error passes, in the jobs that Triton
    has; the table is that of the variant, and only meanwhile.
    """
    pytest.importorskip("pybind11")
    pytest.importorskip("triton")
    seen, ask = [], triton_shapes.config.config_for
    monkeypatch.setattr(
        "reweight_ops._core.backends.triton_token.config_for",
        lambda *args: seen.append(ask(*args)) or seen[-1],
    )
    monkeypatch.setattr(gpu_kernels, "TINY_SHAPES", ((5, 1027),))
    monkeypatch.setattr(gpu_divergence, "TINY_SHAPES", ((1, 33003),))
    monkeypatch.delenv("REWEIGHT_OPS_TRITON_SHAPES", raising=False)
    launch = triton_shapes.config.Launch(64, 64)
    shape = triton_shapes.config.Shape(64, 1, launch, launch)
    monkeypatch.setitem(triton_shapes.config.VARIANTS, "tiny", ((1 << 62, shape),))
    assert gpu_kernels.main(["--dry-run", "--out", str(tmp_path), "small=TRITON_SHAPES=tiny"]) == 0
    found = json.loads((tmp_path / "gpu-kernels.json").read_text())
    (shape,), (pair,) = found["shapes"], found["two_tensors"]
    jobs = {key.removeprefix("small: ") for key in shape["fractions"] if key.startswith("small: ")}
    assert jobs == {
        "one pass",
        "one pass +entropy",
        "statistics",
        "statistics +entropy",
        "statistics +ids",
        "gradient",
    }
    of_two = {key for key in pair["fractions"] if key.startswith("small: ")}
    assert of_two == {
        f"small: divergence{job}" for job in ("", ", sure rows", ", gradient", ", both")
    }
    assert seen and all(config.slots == 64 for config in seen)
    assert "REWEIGHT_OPS_TRITON_SHAPES" not in os.environ


def test_tables_of_rows_alone(monkeypatch, tmp_path, capsys):
    """Nothing is built. Every job has the default table's numbers in every table, with
    sequences of several blocks, and those that PyTorch has without a search.
    """
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu_kernels, "emulated", None)
    monkeypatch.setattr(gpu_rows, "TINY_SHAPES", (gpu_rows.Shape("offsets", 3, 1400, 1300),))
    monkeypatch.setenv("REWEIGHT_OPS_BACKEND", "triton")
    assert gpu_kernels.main(["--dry-run", "--rows", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu-kernels.json").read_text())
    assert list(found["variants"]) == [f"rows, {name}" for name in row_config.VARIANTS]
    assert found["shapes"] == found["two_tensors"] == found["left_out"] == []
    tables, search = found["rows"]
    assert tables["wrong"] == search["wrong"] == {}
    jobs = {key.removeprefix("default: ") for key in tables["us"] if key.startswith("default: ")}
    others = [f"rows, {name}" for name in row_config.VARIANTS if name != "default"]
    assert set(tables["us"]) == {
        "limit: launch",
        *(f"{name}: {job}" for name in ("default", *others) for job in jobs),
    }
    assert len(jobs) == 20 and all(len(us) == 1 for us in tables["us"].values())
    assert {key.partition(": ")[0] for key in search["us"]} == {"limit", "kernels", "PyTorch"}
    assert row_config.row_config() is row_config.VARIANTS["default"]
    assert "decayed sum along" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["padded", "ids"])
@pytest.mark.parametrize("table", row_config.VARIANTS)
def test_a_table_changes_the_order_of_additions_alone(table, layout):
    pytest.importorskip("triton")
    shape = gpu_rows.Shape(layout, 2, *((5000, 2500) if layout == "padded" else (1300, 1100)))
    data = gpu_rows.Data.make(shape, "cpu")
    jobs = data.jobs()
    del jobs["decayed sum along"]  # the interpreter takes seconds for it
    for name, (adds, job) in jobs.items():
        want = data.outcome(job)
        with row_config.using(row_config.VARIANTS[table]):
            got = data.outcome(job)
        assert gpu_rows.fault(got, want, gpu_rows.allowed(shape, table) if adds else 0.0) is None, (
            name
        )


@pytest.mark.parametrize("shape", gpu_rows.SHAPES, ids=lambda shape: shape.name)
def test_jobs_on_rows_can_be_captured(shape):
    """After its first run a job is its kernels alone: no operation of PyTorch, nothing
    from the host.
    """
    pytest.importorskip("triton")
    lengths = shape.lengths()
    assert sum(lengths) == shape.rows and max(lengths) == shape.longest and min(lengths) > 0
    with Counted():
        data = gpu_rows.Data.make(shape, "meta")
        jobs = data.jobs()
        for _, job in jobs.values():
            job()
    for name, (_, job) in jobs.items():
        with Counted() as counted, NoHostCopies():
            job()
        several = {"metrics": 2, "mean of the call": 2, "ratio of the call": 2}
        launches = (several | {"contrast and hinge": 3}).get(name, 1)
        assert counted.kernels.total() == launches and not counted.operations, name


@pytest.mark.parametrize("planted", ["a row too few", "bits", "NaN", "an error"])
def test_a_table_of_rows_with_other_numbers_is_wrong(planted, monkeypatch):
    pytest.importorskip("triton")
    from reweight_ops._core.backends import triton_rows

    shape = gpu_rows.Shape("offsets", 3, 300, 200)
    means, weigh = triton_rows.ratio, triton_rows.weigh

    def is_planted():
        return row_config.row_config() is row_config.VARIANTS["half"]

    def ratio(masked, averaged):
        if is_planted() and planted == "an error":
            raise RuntimeError("planted")
        if is_planted() and planted == "a row too few":
            keep = masked.keep.clone()
            keep[keep.nonzero()[-1]] = False
            masked = masked._replace(keep=keep)
        found = means(masked, averaged)
        if is_planted() and planted == "NaN":
            found[0][-1] = float("nan")
        return found

    def weights(*args):
        found = weigh(*args)
        return found * (1 + 2**-23) if is_planted() and planted == "bits" else found

    monkeypatch.setattr(triton_rows, "ratio", ratio)
    monkeypatch.setattr(triton_rows, "weigh", weights)
    found = gpu_rows.time_rows(shape, {"a": "half", "b": "default"}, "cpu", 1)
    jobs = {"weights"} if planted == "bits" else {"ratio", "ratio along", "ratio of the call"}
    assert set(found["wrong"]) == {f"a: {job}" for job in jobs}
    assert not set(found["wrong"]) & set(found["us"])
    assert "wrong" in "".join(gpu_rows.report([found]))


def test_a_call_that_takes_the_other_way_is_not_timed(monkeypatch):
    """A call like an earlier one takes its way, whatever the bound is."""
    case, steps = gpu_search.TINY_CASES[0], gpu_search.steps

    def alike(case, device):
        return {way: step._replace(scale={}) for way, step in steps(case, device).items()}

    monkeypatch.setattr(gpu_search, "steps", alike)
    found = gpu_search.time_search("cpu", 1, dry_run=True)
    assert found["wrong"] == {f"PyTorch: {case.name}": "kernels took the call: not timed"}


@pytest.mark.parametrize("planted", ["values", "gradient", "NaN"])
def test_a_table_with_other_numbers_is_wrong(planted):
    table = gpu_kernels.Table.make(6, 1000, "cpu")
    reference = gpu_kernels.select.load("reference")
    truth = gpu_kernels.Truth(table, 2)
    for job in ("one pass", "one pass +entropy", "gradient", "statistics +entropy"):
        few = table.some(1, torch.float32)
        values, rows = few.outcome(few.jobs(None, reference)[job][1], 2)
        got = values, rows.to(torch.bfloat16)
        assert gpu_kernels.fault(got, got, truth, job) is None, job
        if planted == "gradient" and job != "statistics +entropy":
            rows[1] *= 1.02
        elif planted == "values" and len(values):
            values[0, 2] += 1e-3
        elif planted == "NaN" and len(values):
            values[-1, 2] = float("nan")
        else:
            continue
        assert "of the error that is allowed" in gpu_kernels.fault(
            (values, rows.to(torch.bfloat16)), got, truth, job
        ), job


def test_a_variant_with_other_bits_is_wrong(monkeypatch):
    """The gate: a failing variant is named and not timed."""
    pytest.importorskip("pybind11")
    if compiler() is None:
        pytest.skip("no C++ compiler to build the emulated kernels")
    made = gpu_kernels.emulated({"shipped": "", "other": ""})
    module, primitives = made["other"]

    class Other:
        def __getattr__(self, name):
            def call(*args):
                found = getattr(primitives, name)(*args)
                return [x + 1e-3 for x in found] if name == "token_stats" else found

            return call

    found = gpu_kernels.time_shape(3, 100, {**made, "other": (module, Other())}, "cpu", 1)
    assert set(found["wrong"]) == {"other: statistics", "other: statistics +entropy"}
    assert "other: statistics +ids" in found["ms"]  # of another primitive
    assert not set(found["wrong"]) & set(found["ms"]) and "wrong" in "".join(
        gpu_kernels.report([found])
    )


def test_settings():
    assert gpu_variants.defines("RING_KEEP=0 STATS_BLOCKS=3") == [
        "-DRW_RING_KEEP=0",
        "-DRW_STATS_BLOCKS=3",
    ]
    for settings in ("RING_KEPT=0", "RING_KEEP", "RING_KEEP=", "-DRW_RING_KEEP=0"):
        with pytest.raises(ValueError, match="expected NAME=VALUE"):
            gpu_variants.defines(settings)
    assert gpu_variants.parse(["a=RING_KEEP=0", "b="]) == {
        "shipped": "",
        "a": "RING_KEEP=0",
        "b": "",
    }
    assert gpu_variants.parse(["c=TRITON_SHAPES=three programs"]) == {
        "shipped": "",
        "c": "TRITON_SHAPES=three programs",
    }
    assert gpu_variants.parse(["d=TRITON_ROWS=wide"])["d"] == "TRITON_ROWS=wide"
    with pytest.raises(ValueError, match="one of .*'four rows'"):
        gpu_variants.parse(["d=TRITON_ROWS=five rows"])
    with pytest.raises(ValueError, match="one of .*'three programs'"):
        gpu_variants.parse(["c=TRITON_SHAPES=four programs"])
    assert set(triton_shapes.VARIANTS) == {
        f"triton, {name}" for name in triton_shapes.config.VARIANTS
    }
    for text in ("=RING_KEEP=0", "shipped=RING_KEEP=0"):
        with pytest.raises(ValueError, match="expected a unique name"):
            gpu_variants.parse([text])
    for settings in gpu_variants.VARIANTS.values():
        gpu_variants.defines(settings)


@pytest.mark.parametrize(
    "arguments, chosen",
    [
        ([], list(gpu_variants.FIRST)),
        (["--all"], list(gpu_variants.VARIANTS)),
        (["a=RING_KEEP=0"], ["shipped", "a"]),
    ],
)
def test_which_variants_run(arguments, chosen, monkeypatch, tmp_path):
    class Chosen(Exception):
        pass

    def emulated(variants):
        raise Chosen(list(variants))

    monkeypatch.setattr(gpu_kernels, "emulated", emulated)
    with pytest.raises(Chosen) as got:
        gpu_kernels.main(["--dry-run", "--out", str(tmp_path), *arguments])
    assert got.value.args == (chosen,)


def test_a_variant_compiles_the_files_that_it_changes():
    assert gpu_variants.files("") == ()
    assert gpu_variants.files("RING_KEEP=0 STATS_BLOCKS=3") == ("ring", "streaming")
    assert gpu_variants.files("DIVERGENCE_SURE=0") == ("divergence",)
    assert gpu_variants.files("DIVERGENCE_SURE=0 GRAD_BLOCKS=1") == (
        "ring",
        "streaming",
        "divergence",
    )


def test_every_variant_has_a_prediction():
    """The notes have a line for each variant and for no other."""
    lines = (ROOT / "bench/NOTES.md").read_text().splitlines()

    def first_cells(header: str) -> list[str]:
        (start,) = [i for i, line in enumerate(lines) if line.startswith(header)]
        table = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
        return [line.split("|")[1].strip() for line in table]

    of_cuda = [f"{name}: `{s}`" for name, s in gpu_variants.VARIANTS.items() if s]
    assert first_cells("| variant | predicted |") == of_cuda
    of_triton = first_cells("| shapes (`REWEIGHT_OPS_TRITON_SHAPES`")
    assert [cell.partition(":")[0] for cell in of_triton] == list(triton_shapes.config.VARIANTS)
    of_rows = first_cells("| sizes (`REWEIGHT_OPS_TRITON_ROWS`")
    assert [cell.partition(":")[0] for cell in of_rows] == list(row_config.VARIANTS)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc_builds_variants(tmp_path):
    """Every default variant compiles without spills, and several modules can be loaded
    together.
    """
    paths = gpu_variants.build(gpu_variants.VARIANTS, "90", tmp_path)
    modules = {name: gpu_variants.load(path) for name, path in paths.items()}
    assert len({id(module) for module in modules.values()}) == len(gpu_variants.VARIANTS)
    assert all(module.archs() == "90" for module in modules.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu_kernels.main(["--out", str(tmp_path)]) == 2
    assert "--dry-run" in capsys.readouterr().err
