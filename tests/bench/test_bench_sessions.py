"""Sessions can be measured; the figures are of the sessions that were asked for."""

from __future__ import annotations

from sandboxes import running

from system.bench.sessions import measure
from system.tools.sandbox.sandbox import Sandbox


async def test_a_few_sessions_are_measured() -> None:
    async with running(Sandbox(namespaces=True)):
        row = await measure(20, [])
    assert row["live_sessions"] == 20
    assert 0 < row["fork_ms_p50"] <= row["fork_ms_p99"]
    assert 0 < row["private_mb"] <= row["pss_mb"] < 50
