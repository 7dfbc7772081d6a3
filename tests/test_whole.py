from __future__ import annotations

import errno
from pathlib import Path

import pytest

from system.whole import appearing


def test_a_directory_appears_whole_in_place_of_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model"
    for text in ("old", "new"):
        with appearing(path) as partial:
            assert path.is_dir() == (text == "new")
            (partial / text).touch()
        assert [file.name for file in path.iterdir()] == [text]
    assert [one.name for one in path.parent.iterdir()] == ["model"]


def test_what_was_left_half_full_never_has_its_name(tmp_path: Path) -> None:
    path = tmp_path / "model"

    def torn() -> None:
        with appearing(path) as partial:
            (partial / "half").touch()
            raise OSError(errno.ENOSPC, "no space left")

    with pytest.raises(OSError, match=r"model\.partial"):
        torn()
    assert not path.exists()
    assert (tmp_path / "model.partial" / "half").is_file()
    with appearing(path) as partial:
        (partial / "whole").touch()
    assert [file.name for file in path.iterdir()] == ["whole"]
