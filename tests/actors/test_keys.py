"""A run's keys: where a judge's comes from, and where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors import keys
from system.config import ConfigError, load

JUDGED = (
    "reward=[arpo, {name: judge, options: {base_url: 'http://judge/v1', model: m, api_key_env: JUDGE_KEY}}]"
)


def test_a_judges_key_is_read_from_the_environment_and_stands_in_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(None, [JUDGED])
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    said = r"reward.parts\[1\].options.api_key_env=JUDGE_KEY: this environment variable is not set"
    with pytest.raises(ConfigError, match=said), keys.made(config, tmp_path):
        pass
    monkeypatch.setenv("JUDGE_KEY", "sk-hunter2")
    with keys.made(config, tmp_path):
        assert keys.held().rewards == {"JUDGE_KEY": "sk-hunter2"}
        assert "hunter2" not in repr(keys.held())
        assert not [path for path in tmp_path.iterdir() if "hunter2" in path.read_text()]
    assert not keys.held().rewards
