"""The same cases and providers with pytest-benchmark: ``pytest bench --benchmark-only
-k "128x151936 and bfloat16"``.
"""

import pytest

from .cases import cases
from .linear import linear_cases, linear_providers
from .measure import gate
from .providers import Absent, providers


@pytest.mark.parametrize(
    "provider", [*providers(("cpu",)), *linear_providers(("cpu",))], ids=lambda p: p.name
)
@pytest.mark.parametrize("case", [*cases(), *linear_cases("cpu")], ids=lambda c: c.name)
def test_speed(benchmark, case, provider):
    if not provider.serves(case):
        pytest.skip("the provider does not have this job")
    data = case.data()
    try:
        job = provider.make(data)
    except Absent as reason:
        pytest.skip(str(reason))
    assert gate(provider, data, job) <= 1, "wrong results are not timed"
    benchmark.group = case.name
    benchmark.pedantic(job, setup=data.restore, rounds=7, warmup_rounds=1)
