"""Running one program as a notebook's cell: its output as it comes, then the value of a last bare expression.

The value is told whether or not something was printed, as its repr, unless it is None.  ``exit()``,
``quit()`` and ``sys.exit()`` end a program well.  A Markdown fence around the program is not part of it.
"""

from __future__ import annotations

import ast
import builtins
import io
import linecache
import os
import re
import sys
import threading
import traceback
import types
from collections.abc import Callable

FILENAME = "<python>"
_FENCED = re.compile(r"\s*(`{3,})[^\S\n]*[\w.+-]*[^\S\n]*\n(.*?)(?:\n?[^\S\n]*\1)?\s*", re.DOTALL)


def run(source: str) -> int:
    """Execute ``source`` in a fresh ``__main__`` and print what it fails with.  Returns the exit code a
    script has."""
    return run_cell(source, fresh_main(), _join_threads)


def fresh_main() -> dict[str, object]:
    """The names of a new, empty ``__main__``."""
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    builtins.__dict__.update(exit=sys.exit, quit=sys.exit)  # which the site module, left out here, provides
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        numpy_random.seed()  # imported before the fork: every call would draw the same
    sys.modules["__main__"] = module
    return module.__dict__


def run_cell(
    source: str, namespace: dict[str, object], join_threads: Callable[[], None], filename: str = FILENAME
) -> int:
    """Execute ``source`` in ``namespace``, wait for its threads, and print what it fails with.  Returns the
    exit code a script has.  ``filename``: what tracebacks call it, beginning as :data:`FILENAME` does."""
    try:
        execute(unfenced(source), namespace, filename)
        join_threads()
    except SystemExit as stop:
        return _exit_code(stop.code)
    except BaseException as error:
        _print_error(error)
        return 1
    return 0


def unfenced(source: str) -> str:
    """``source`` without the Markdown fence around all of it, if there is one, also one left open."""
    found = _FENCED.fullmatch(source)
    return found.group(2) if found else source


def take_streams() -> None:
    """New text streams on descriptors 0, 1 and 2, which have changed under Python's feet."""
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    take_outputs()


def take_outputs() -> None:
    """The same for descriptors 1 and 2."""
    sys.stdout = sys.__stdout__ = _text_writer(1)
    sys.stderr = sys.__stderr__ = _text_writer(2)


def _text_writer(descriptor: int) -> io.TextIOWrapper:
    return open(descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


def leave(code: int) -> None:
    """End this process at once, with what was printed."""
    flush()
    os._exit(code & 0xFF)


def flush() -> None:
    """Let go of all that was printed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # closed or replaced by the program: nothing to flush
            continue


def execute(source: str, namespace: dict[str, object], filename: str = FILENAME) -> None:
    """Run the program in ``namespace`` and print its value.  Raises what it raises; :func:`told` shows it."""
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    tree = ast.parse(source, filename)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, filename, "exec"), namespace)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), filename, "eval"), namespace)
        if value is not None:
            print(repr(value))


def _join_threads() -> None:
    """Wait for the program's threads, as the interpreter does at its end."""
    vars(threading)["_shutdown"]()


def join_own_threads() -> None:
    """Wait for the threads that a cell has left; daemons and the workers of a pool live on to the next."""
    pools = sys.modules.get("concurrent.futures.thread")
    idle: set[threading.Thread] = set() if pools is None else set(pools._threads_queues)
    for thread in set(threading.enumerate()) - idle - {threading.current_thread()}:
        if not thread.daemon:
            thread.join()


def _exit_code(code: object) -> int:
    if code is None or isinstance(code, int):
        return int(code or 0)
    print(code, file=sys.stderr)
    return 1


def told(error: BaseException) -> str:
    """The traceback of what :func:`execute` raised, as the program's author reads it."""
    frames = error.__traceback__
    while frames is not None and not frames.tb_frame.f_code.co_filename.startswith(FILENAME[:-1]):
        frames = frames.tb_next  # our own frames say nothing to the program's author
    return "".join(traceback.format_exception(type(error), error, frames))


def _print_error(error: BaseException) -> None:
    try:
        sys.stderr.write(told(error))
    except BaseException:  # an exception whose own __str__ fails, or no memory left to format it
        os.write(2, f"{type(error).__name__}\n".encode())
