"""How the site draws the catalogue's formulas: what LaTeX they become, and what stays
code.
"""

import re
import sys

import pytest
from paths import ROOT

sys.path.append(str(ROOT / "docs"))
from site_formulas import latex

PAGE = (ROOT / "docs/methods.md").read_text()
#: A divergence of two distributions as an argument of a word; a loss's name with a
#: hyphen.
TEXT = {"mean(w·loss) - temperature·KL(w/n || uniform)", "-log σ(β·m) + 0.2·mean-NLL(y_w)"}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("-A·logp", r"-A \cdot \log p"),
        (
            "-min(r·A, clip(r, 1-ε_low, 2)·A)",
            r"-\operatorname{min}(r \cdot A, \operatorname{clip}(r, 1 - ε_{\text{low}}, 2) \cdot A)",
        ),
        (
            "(r - mean_g) / (std_g + epsilon)",
            r"\frac{r - \operatorname{mean}_{g}}{\operatorname{std}_{g} + ε}",
        ),
        ("(a + b)·(c + d)/n", r"(a + b) \cdot \frac{c + d}{n}"),
        ("a + b/n", r"a + \frac{b}{n}"),
        ("a·b / n", r"\frac{a \cdot b}{n}"),
        ("e^(s/τ)", r"e^{s/τ}"),
        (
            "exp(r_i)/sum_j exp(r_j)",
            r"\frac{\operatorname{exp}(r_{i})}{\sum_{j} \, \operatorname{exp}(r_{j})}",
        ),
        # a log over a length, not the log of a fraction
        ("log π(y)/|y|", r"\operatorname{log} \, π(y)/\vert y \vert"),
        ("Σ_{j in q-} x_j²", r"\sum_{j \in q^{-}} \, x_{j}^{2}"),
        ("1[p_old < threshold]", r"\mathbf{1}[p_{\text{old}} < \text{threshold}]"),
        (
            "min(exp(A), max_weight)",
            r"\operatorname{min}(\operatorname{exp}(A), \text{max_weight})",
        ),
        ("(r~ - V*) [/ (std + ε)]", r"(\tilde{r} - V^{*}) \, [/ (\operatorname{std} + ε)]"),
        ("1/(2β)", r"\frac{1}{2 \, β}"),
    ],
)
def test_a_formula(text, expected):
    assert latex(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *(
            "beta",
            "[B, T]",
            "[B, K] -> [B]",
            'loss_type="dapo"',
            "comp_sum(tau=1)",
            "advantages.ngrpo",
            "f_dpo",
        ),
        *("clip(r", "a ± ", "log-ratio_w·2", "x) + (y", "[3·P, T]", "-1"),
    ],
)
def test_code(text):
    assert latex(text) is None


def test_the_catalogue_is_drawn():
    spans = re.findall(r"`([^`\n]+)`", PAGE)
    meant = {text for text in spans if re.search(r"[·Σ√Π½²]|\^", text) and not text.startswith("[")}
    assert len(meant) > 150
    assert {text for text in meant if latex(text) is None} == TEXT


def test_what_is_drawn_can_be_drawn():
    convert = pytest.importorskip("latex2mathml.converter").convert
    for text in set(re.findall(r"`([^`\n]+)`", PAGE)):
        if (formula := latex(text)) is not None:
            assert convert(formula).startswith("<math") and "\\" not in convert(formula)
