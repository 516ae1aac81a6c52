"""Two minutes of the mixed traffic of ``make soak``: nothing is lost."""

from __future__ import annotations

import pytest

from tests.support.soak import run


@pytest.mark.server
@pytest.mark.full
def test_mixed_traffic_loses_nothing() -> None:
    got = run(2.0, seed=1, quant=True)
    assert got["lost"] == []
    assert sum(got["finished"].values()) > 20
    assert got["shrinks"] and got["idle_checks"] >= 2
