"""The examples run from a clean directory to their files."""

import importlib.util
import json
import subprocess
import sys
from itertools import combinations
from statistics import fmean

import pytest
from paths import ROOT

EXAMPLES = ROOT / "examples"


@pytest.mark.slow
def test_trl_addition(tmp_path):
    for library in ("trl", "typer", "rich", "matplotlib"):
        pytest.importorskip(library)
    options = [
        "--steps",
        "2",
        "--seeds",
        "2",
        "--warm-start",
        "300",
        "--cost-rows",
        "4",
        "--out",
        str(tmp_path / "out"),
    ]
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "trl_addition.py"), *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    numbers = json.loads((tmp_path / "out" / "trl_addition.json").read_text())
    assert [run["name"] for run in numbers["runs"]] == [
        "stock TRL",
        "stock TRL",
        "fused",
        "fused + AR",
        "fused, Lopti",
    ]
    assert all(a["gradient_difference"] <= 1e-6 for a in numbers["agreement"])
    shares = numbers["gradient_share_by_probability_quartile"]
    assert shares["reweighted"][0] < shares["plain"][0], (
        "reweighting must take from the least likely tokens"
    )
    assert [c["name"] for c in numbers["cost"]["found"]] == [
        "eager PyTorch",
        "torch.compile",
        "fused op",
        "fused op, in place",
    ]
    assert (tmp_path / "out" / "trl_addition.png").stat().st_size > 10_000


@pytest.mark.slow
def test_ablations(tmp_path):
    """In its smallest form: every run of a group is there, and so are the picture and
    its table.
    """
    for library in ("transformers", "datasets", "typer", "rich", "matplotlib"):
        pytest.importorskip(library)
    options = [
        "--rollouts",
        "1",
        "--seeds",
        "2",
        "--warm-start",
        "2",
        "--jobs",
        "1",
        "--only",
        "hapo",
        "--out",
        str(tmp_path / "out"),
    ]
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "ablations.py"), *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    numbers = json.loads((tmp_path / "out" / "ablations.json").read_text())
    names = [variant["name"] for variant in numbers["variants"]]
    assert (
        names[0] == "GRPO, dual clip"
        and len(names) == 6
        and all(name.startswith("HAPO") for name in names[1:])
    )
    assert all(
        len(variant["reward"]) == len(variant["rewards"]) == 2 for variant in numbers["variants"]
    )
    assert (tmp_path / "out" / "ablations.png").stat().st_size > 10_000 and not (
        tmp_path / "out" / "ablations_start.pt"
    ).exists()


def test_the_page_of_ablations_is_fresh(monkeypatch):
    """Every figure of it is the result file's: another number would be another page."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    report = importlib.import_module("addition.ablation_report")
    numbers = json.loads((ROOT / "docs" / "demo" / "ablations.json").read_text())
    page = (ROOT / "docs" / "ablations.md").read_text()
    assert report.page(numbers) == page, "run python examples/ablations.py --page"
    variants = importlib.import_module("addition.variants").VARIANTS
    assert [v["name"] for v in numbers["variants"]] == [v.name for v in variants], (
        "a variant without numbers: run make ablations"
    )
    for variant in numbers["variants"]:
        assert len(variant["reward"]) == numbers["settings"]["seeds"] >= 3
        changed = {**variant, "reward": [x + 0.01 for x in variant["reward"]]}
        assert (
            report.page(
                {
                    **numbers,
                    "variants": [changed if v is variant else v for v in numbers["variants"]],
                }
            )
            != page
        )


@pytest.mark.parametrize("lopti", [False, True])
def test_group_advantages_learns(lopti):
    """It starts from the rate of guessing (one digit in ten) and runs thirty steps."""
    spec = importlib.util.spec_from_file_location(
        "group_advantages", EXAMPLES / "group_advantages.py"
    )
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    history = example.train("grpo", steps=30, lopti=lopti)
    assert history[0] < 0.15 and sum(history[-5:]) / 5 > 2 * history[0]


def test_group_advantages_has_estimators_that_run():
    spec = importlib.util.spec_from_file_location(
        "group_advantages", EXAMPLES / "group_advantages.py"
    )
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    for name in example.ESTIMATORS:
        assert len(example.train(name, steps=1, lopti=False)) == 1


def test_preference(capsys):
    spec = importlib.util.spec_from_file_location("preference_example", EXAMPLES / "preference.py")
    example = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = example
    spec.loader.exec_module(example)
    runs = example.main(["--steps", "40"])
    assert set(runs) == {"dpo", "wpo", "sparse_po", "our own"}
    for name, history in runs.items():
        # the reference is where training starts
        assert history[0]["rewards/margins"] == 0 or name == "sparse_po"
        assert (
            history[-1]["rewards/accuracies"] == 1
            and history[-1]["loss"] < 0.8 * history[0]["loss"]
        ), name
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_trl_heads(capsys):
    pytest.importorskip("trl")
    spec = importlib.util.spec_from_file_location("trl_heads", EXAMPLES / "trl_heads.py")
    example = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = example
    spec.loader.exec_module(example)
    for name, (stock, ours, left) in example.main(["--steps", "4"]).items():
        # TRL logs four digits
        assert (
            ours == pytest.approx(stock, rel=1e-4) and len(stock) == 4 and stock[-1] < stock[0]
        ), name
        assert left == {}
    assert "on our op" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_trl_recipe(capsys):
    pytest.importorskip("trl")
    spec = importlib.util.spec_from_file_location("trl_recipe", EXAMPLES / "trl_recipe.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main(["--recipe", "ar_lopti", "--steps", "2"]) == {
        "fused": {"linear_token_logps": 2, "linear_policy_loss": 2},
        "left": {},
    }
    assert "for spec in specs:" in capsys.readouterr().out


def test_logits_functions(capsys):
    spec = importlib.util.spec_from_file_location(
        "logits_functions", EXAMPLES / "logits_functions.py"
    )
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    (loss, gradient, our_loss, our_gradient), ran = example.main()
    assert our_loss == pytest.approx(loss, rel=1e-6) and our_gradient == pytest.approx(
        gradient, rel=1e-6
    )
    assert (
        ran == {"token_logps": 1, "token_stats": 1}
        and "by the trainer's functions" in capsys.readouterr().out
    )


def test_tinker_loss(capsys):
    spec = importlib.util.spec_from_file_location("tinker_loss", EXAMPLES / "tinker_loss.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    value, code = example.main()
    # -r·A·((1 - α) + α·p_old) over four tokens, r = e^.1 of the three here.
    expected = (
        -0.7
        * 2.718281828**0.1
        * sum(0.7 + 0.3 * 2.718281828 ** (x - 0.1) for x in (-0.5, -1.0, -3.0))
        / 4
    )
    assert abs(value - expected) < 1e-6 and "torch.exp" in code
    assert "inputs: logprobs, advantages, old_logprobs, weights" in capsys.readouterr().out


def test_what_the_loss_costs(monkeypatch):
    """In place it takes no memory of the logits' size, as a drop-in their gradient's;
    wrong gradients are not timed.
    """
    monkeypatch.syspath_prepend(str(EXAMPLES))
    cost = importlib.import_module("addition.cost")
    rows, vocab = 16, 4096
    found = {c.name: c for c in cost.measure(rows, vocab, rounds=1, compiled=False)}
    size = 2 * rows * vocab
    assert found["fused op, in place"].extra_bytes < size / 8
    assert size <= found["fused op"].extra_bytes < 1.25 * size
    assert found["eager PyTorch"].extra_bytes > 4 * size
    monkeypatch.setattr(
        cost, "eager_policy_loss", lambda *a, **k: 1.1 * cost.rw.testing.eager_policy_loss(*a, **k)
    )
    with pytest.raises(RuntimeError, match="differs from eager"):
        cost.measure(rows, vocab, rounds=1, compiled=False)


def test_the_readme_tells_the_demos_committed_figures():
    found = json.loads((ROOT / "docs/demo/trl_addition.json").read_text())
    text = " ".join((ROOT / "README.md").read_text().split())
    rewards = {
        (run["name"], run["seed"]): [step["reward"] for step in run["log"] if "reward" in step]
        for run in found["runs"]
    }

    def smoothed(values):
        return [fmean(values[max(i - 4, 0) : i + 1]) for i in range(len(values))]

    def apart(a, b):
        pairs = zip(smoothed(rewards[a]), smoothed(rewards[b]), strict=True)
        return fmean(abs(x - y) for x, y in pairs)

    def ends(name):
        return fmean(rewards[name, 0][:5]), fmean(rewards[name, 0][-5:])

    def size(x):
        return f"{x:.1e}".replace("e-0", "e-")

    on, off = found["agreement"]
    share = found["gradient_share_by_probability_quartile"]
    stock = [("stock TRL", seed) for seed in range(3)]
    spread = fmean(apart(a, b) for a, b in combinations(stock, 2))
    last = [fmean(rewards[each][-5:]) for each in stock]
    for told in (
        f"are {size(on['loss_difference'])} and {size(on['gradient_difference'])} on-policy",
        f"{size(off['loss_difference'])} and {size(off['gradient_difference'])} off-policy",
        f"they are {apart(('fused', 0), stock[0]):.4f} apart on average",
        f"Two stock seeds are {spread:.4f} apart",
        f"the least likely quarter carries {100 * share['plain'][0]:.0f} % of",
        f"norm, {100 * share['reweighted'][0]:.0f} % when reweighted",
        "AR ({:.3f} to {:.3f}) is within the noise".format(*ends("fused + AR")),
        "Lopti ({:.3f} to {:.3f}) below it".format(*ends("fused, Lopti")),
        f"{found['cost']['rows']} rows of {found['cost']['vocabulary']} bf16 logits",
    ):
        assert told in text, told
    # "within the noise of the seeds", "below it"
    assert abs(ends("fused + AR")[1] - last[0]) < max(last) - min(last)
    assert ends("fused, Lopti")[1] < min(last)
