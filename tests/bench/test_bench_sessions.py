"""Sessions can be measured; the figures are of the sessions that were asked for."""

from __future__ import annotations

import pytest

from system.bench.sessions import measure
from system.tools.sandbox.sandbox import Sandbox, SandboxUnavailable


async def test_a_few_sessions_are_measured() -> None:
    box = Sandbox(namespaces=True)
    try:
        await box.start()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    finally:
        await box.close()
    row = await measure(20, [])
    assert row["live_sessions"] == 20
    assert 0 < row["fork_ms_p50"] <= row["fork_ms_p99"]
    assert 0 < row["private_mb"] <= row["pss_mb"] < 50
