"""docs/scaling.md holds what bench/scaling.py computes."""

from paths import ROOT

from bench import scaling


def test_the_table_is_the_model():
    assert "\n".join(scaling.table()) in (ROOT / "docs/scaling.md").read_text()


def test_the_formulas_of_the_page():
    page = (ROOT / "docs/scaling.md").read_text()
    for bytes_a_row, what in (
        (scaling.states(1, scaling.LOGP_STATES), "log-probs"),
        (scaling.states(1, scaling.DIVERGENCE_STATES), "divergences"),
    ):
        assert f"| {what} | {bytes_a_row}·N | 1 all-gather |" in page
    assert (
        f"| log-probs and entropies: every policy loss | {scaling.states(1, scaling.LOGP_STATES + 1)}·N |"
        in page
    )
    assert f"| before the call: data that the ranks compare | {scaling.AGREEMENT} |" in page
    links = scaling.Links()
    assert (
        f"{links.inside:.0f} GB/s and {links.latency_inside:.0f} µs" in page
        and f"{links.between:.0f} GB/s and {links.latency_between:.0f} µs" in page
    )
