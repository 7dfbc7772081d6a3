"""From an error to an exit code, and to the words for it."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest

from actors.ray_support import ActorLost, StartFailed
from system import errors
from system.errors import ConfigError, exit_code, naming, told
from system.tools.service import ToolStartError


class FromRay(Exception):
    """What a library calls a lost process."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("learn.lr"), errors.USAGE),
        (ToolStartError("search"), errors.FAILED),
        (ActorLost("engine-0"), errors.LOST),
        (StartFailed("engine-0"), errors.FAILED),
        (FromRay(), errors.LOST),
        (ZeroDivisionError(), errors.FAILED),
        (KeyboardInterrupt(), errors.INTERRUPTED),
        (b"\xe9".decode, errors.USAGE),
        (ExceptionGroup("", [ActorLost("a"), FromRay()]), errors.LOST),
        (ExceptionGroup("", [ActorLost("a"), ExceptionGroup("", [StartFailed("b")])]), errors.FAILED),
        (ExceptionGroup("", [ActorLost("a"), ConfigError("b")]), errors.USAGE),
    ],
)
def test_an_error_ends_a_process_with_its_code(error: object, code: int) -> None:
    if callable(error):
        with pytest.raises(UnicodeDecodeError) as caught:
            error("utf-8")
        error = caught.value
    assert isinstance(error, BaseException)
    assert exit_code(error, lost=(FromRay,)) == code


def test_words_for_people() -> None:
    with pytest.raises(OSError, match="no/such") as caught:
        open("no/such")  # noqa: SIM115
    assert told(caught.value) == "no/such: No such file or directory"
    assert told(ConfigError("run.seed: 3")) == "run.seed: 3"
    assert told(TimeoutError()) == "TimeoutError"


def test_an_error_of_the_disk_names_the_file() -> None:
    full = (28, "No space left on device")
    with pytest.raises(OSError, match="No space") as caught, naming("runs/a/ledger.jsonl"):
        raise OSError(*full)
    assert told(caught.value) == "runs/a/ledger.jsonl: No space left on device"
    with pytest.raises(OSError, match="No space") as caught, naming("another"):
        raise OSError(*full, "its own")
    assert told(caught.value) == "its own: No space left on device"
    with pytest.raises(OSError, match="in words") as words, naming("a third"):
        raise OSError("in words")
    assert told(words.value) == "in words"
    again = pickle.loads(pickle.dumps(caught.value))  # as Ray hands it on
    assert told(again) == told(caught.value)


def test_every_error_of_ours_has_the_one_base() -> None:
    """All but those of a module that catches its own, and of the sandbox's processes, which catch theirs and
    import nothing of ours but the sandbox.
    """
    root = Path(__file__).parents[1]
    caught_where_raised = {"TreeLost", "TreesLost", "Lost", "NotCopied", "Unseen", "Ended", "Refused"}
    for path in [*root.glob("system/**/*.py"), *root.glob("actors/**/*.py")]:
        for one in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(one, ast.ClassDef) and not one.name.startswith("_"):
                bases = [base.id for base in one.bases if isinstance(base, ast.Name)]
                if one.name not in caught_where_raised and path.name != "errors.py":
                    foreign = {"Exception", "RuntimeError", "ValueError", "OSError"} & set(bases)
                    assert not foreign or "EspalierError" in bases, f"{path}: class {one.name}"
