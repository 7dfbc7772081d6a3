"""What a program may do in the sandbox, and how its result is told."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from system.tools.outcome import ToolStatus
from system.tools.sandbox.packages import find
from system.tools.sandbox.sandbox import Sandbox, SandboxLimits, SandboxUnavailable

SITE_PACKAGES = Path(np.__file__).resolve().parents[1]
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("print('a'); print('b')", "a\nb"),
        ("6 * 7", "42"),
        ("'x'", "'x'"),
        ("None", ""),
        ("", ""),
        ("x = 3", ""),
        ("print(1)\nx = 2\nx", "1\n2"),
        ("def f(n):\n    return n + 1\n\nf(1)", "2"),
        ("import math\nmath.sqrt(2)", "1.4142135623730951"),
        ("from fractions import Fraction\nFraction(1, 3) + Fraction(1, 6)", "Fraction(1, 2)"),
        ("if __name__ == '__main__':\n    print('main')", "main"),
        ("'a\\u00e9\\u2713'", "'aé✓'"),
        ("import sqlite3\nsqlite3.connect(':memory:').execute('select 1 + 1').fetchone()", "(2,)"),
        ("import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 5\nasyncio.run(f())", "5"),
        ("import threading\nt = threading.Thread(target=print, args=('t',))\nt.start(); t.join()", "t"),
        ("import threading\nthreading.Timer(0.05, print, ('late',)).start()", "late"),
        ("open('f', 'w').write('hi')\nprint(open('f').read())", "hi"),
        ("import tempfile\nwith tempfile.TemporaryFile() as f:\n    f.write(b'x')\n    print(f.tell())", "1"),
        ("import sys\nsys.exit(0)", ""),
        ("print(1)\nexit()\nprint(2)", "1"),
        ("print(1)\nquit(0)", "1"),
        ("```python\n6 * 7\n```", "42"),
        ("import os\nprint('a', flush=True)\nos._exit(0)", "a"),
    ],
)
async def test_programs(sandbox: Sandbox, code: str, text: str) -> None:
    result = await sandbox.run(code)
    assert (result.status, result.text) == (ToolStatus.OK, text)


@pytest.mark.parametrize(
    ("code", "last_line"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("print(", "SyntaxError: '(' was never closed"),
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("input()", "EOFError: EOF when reading a line"),
        ("import sys\nsys.exit(3)", "The program exited with code 3."),
        ("import sys\nsys.exit('no luck')", "no luck"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("import ctypes\nctypes.string_at(0)", "The program was killed by SIGSEGV."),
        ("class E(Exception):\n    def __str__(self): raise E\nraise E", "E: <exception str() failed>"),
    ],
)
async def test_failures_are_errors(sandbox: Sandbox, code: str, last_line: str) -> None:
    result = await sandbox.run(code)
    assert result.status is ToolStatus.ERROR
    assert result.text.splitlines()[-1].startswith(last_line)


async def test_the_traceback_shows_the_program_and_nothing_of_ours(sandbox: Sandbox) -> None:
    result = await sandbox.run("def half(x):\n    return x / 0\n\nprint('before')\nhalf(2)")
    assert result.stdout == "before\n"
    assert "return x / 0" in result.stderr
    assert "forkserver" not in result.stderr
    assert "program.py" not in result.stderr


async def test_wall_deadline(sandbox: Sandbox) -> None:
    started = time.monotonic()
    result = await sandbox.run("print('so far')\nimport time\ntime.sleep(60)", deadline_s=2.0)
    assert result.status is ToolStatus.TIMEOUT
    assert result.stdout == "so far\n"
    assert "longer than 2 s" in result.text
    assert time.monotonic() - started < 6.7


async def test_no_time_left(sandbox: Sandbox) -> None:
    assert (await sandbox.run("1", deadline_s=0.0)).status is ToolStatus.TIMEOUT


async def test_cpu_limit_ends_a_loop_before_the_wall_deadline() -> None:
    box = Sandbox(SandboxLimits(wall_s=30, cpu_s=1))
    await box.start()
    try:
        result = await box.run("while True: pass")
    finally:
        await box.close()
    assert result.status is ToolStatus.TIMEOUT
    assert "1 s of CPU" in result.text
    assert result.wall_s < 25


async def test_long_output_is_cut_with_a_notice(sandbox: Sandbox) -> None:
    result = await sandbox.run("print('x' * 100_000)")
    assert result.status is ToolStatus.OK
    assert result.truncated
    assert result.stdout == "x" * 2000 + "\n… [output cut: 100001 bytes in all]"
    exact = await sandbox.run("print('é' * 1999)")
    assert not exact.truncated
    assert exact.stdout == "é" * 1999 + "\n"


async def test_of_a_long_traceback_the_end_is_kept(sandbox: Sandbox) -> None:
    result = await sandbox.run("raise ValueError('x' * 10_000 + 'end')")
    assert result.stderr.endswith("xend\n")
    assert len(result.stderr) < 2100


async def test_output_that_is_not_text(sandbox: Sandbox) -> None:
    result = await sandbox.run("import os\nos.write(1, b'\\xff\\xfeok')\nNone")
    assert result.text == "\ufffd\ufffdok"


async def test_hash_order_is_the_same_in_every_call_and_every_server(sandbox: Sandbox) -> None:
    code = "print(list({'a', 'b', 'c', 'd', 'e'}))"
    other = Sandbox()
    await other.start()
    try:
        assert (await sandbox.run(code)).text == (await other.run(code)).text
    finally:
        await other.close()


async def test_chance_differs_between_calls(sandbox: Sandbox) -> None:
    code = "import random\nrandom.random()"
    assert (await sandbox.run(code)).text != (await sandbox.run(code)).text


async def test_calls_share_nothing(sandbox: Sandbox) -> None:
    await sandbox.run("import math\nmath.pi = 3\nopen('left', 'w').close()")
    result = await sandbox.run("import math, os\nprint(math.pi, os.listdir())")
    assert result.text == "3.141592653589793 []"


async def test_many_at_once(sandbox: Sandbox) -> None:
    results = await asyncio.gather(*(sandbox.run(f"{i} * 2") for i in range(60)))
    assert [result.text for result in results] == [str(2 * i) for i in range(60)]


async def test_concurrency_is_limited() -> None:
    box = Sandbox(concurrency=1)
    await box.start()
    try:
        started = time.monotonic()
        await asyncio.gather(*(box.run("import time\ntime.sleep(0.2)") for _ in range(3)))
        assert time.monotonic() - started >= 0.6
    finally:
        await box.close()


async def test_packages_on_a_path_and_preloading(outside: Path) -> None:
    (outside / "gift.py").write_text("import os\nVALUE = os.getpid()\n")
    (outside / "gift.py").chmod(0o644)
    box = Sandbox(paths=[str(outside)], preload=["gift"])
    await box.start()
    try:
        result = await box.run("import gift, os\nprint(gift.VALUE != os.getpid())")
        assert result.text == "True"
    finally:
        await box.close()


@pytest.mark.parametrize("namespaces", [True, False])
async def test_installed_packages_and_nothing_else_of_their_place(namespaces: bool) -> None:
    box = Sandbox(packages=["numpy", "no-such-package"], namespaces=namespaces)
    place = SITE_PACKAGES
    try:
        await box.start()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    try:
        code = "import numpy as np\nimport numpy.ma\nprint(np.linalg.inv(np.eye(2) * 2)[0])\nnp.random.rand()"
        first, second = [(await box.run(code)).text.splitlines() for _ in range(2)]
        assert first[0] == "[0.5 0. ]"
        assert first[1] != second[1]  # chance differs between calls
        unnamed = "name = 'num' + 'py'\nimport sys\n(name in sys.modules, __import__(name).__name__)"
        assert (await box.run(unnamed)).text == "(False, 'numpy')"  # not loaded, and there all the same
        assert (await box.run("import sys\n'numpy' in sys.modules")).text == "True"
        assert "No module named 'aiohttp'" in (await box.run("import aiohttp")).text
        assert "Error" in (await box.run(f"open('{place}/aiohttp/__init__.py')")).text
        assert "True" not in (await box.run(f"import os\n'aiohttp' in os.listdir('{place}')")).text
    finally:
        await box.close()
    assert box.packages.missing == ("no-such-package",)


async def test_a_caller_that_gives_up_does_not_stop_the_packages_from_loading() -> None:
    box = Sandbox(packages=["numpy"])
    try:
        await box.start()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(box.run("import numpy\nimport time\ntime.sleep(60)"), 0.01)
        assert (await box.run("2")).text == "2"
        assert (await box.run("import numpy\n3")).text == "3"
        cut = asyncio.create_task(box.run("import numpy\nimport time\ntime.sleep(9)"))
        await asyncio.sleep(0.2)
    finally:
        await box.close()
    with pytest.raises(SandboxUnavailable):
        await cut


async def test_closing_while_the_packages_load() -> None:
    box = Sandbox(packages=["numpy"])
    await box.start()
    code = "import numpy\nimport time\ntime.sleep(60)"  # not over before the end, however long that takes
    calls = [asyncio.create_task(box.run(code)) for _ in range(3)]
    await asyncio.sleep(0.05)
    await box.close()
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(one, SandboxUnavailable) for one in ended), ended


def test_a_package_comes_with_what_it_requires() -> None:
    found = find(["sympy"])
    assert {"sympy", "mpmath"} <= found.modules.keys()
    assert found.imported == ("sympy",)
    assert find(["yaml"]).imported == ("yaml",)  # by its module's name


async def test_a_preload_that_fails_stops_the_start_with_its_reason() -> None:
    with pytest.raises(SandboxUnavailable, match="no_such_module_anywhere"):
        await Sandbox(preload=["no_such_module_anywhere"]).start()


async def test_run_before_start() -> None:
    with pytest.raises(SandboxUnavailable, match="not been started"):
        await Sandbox().run("1")


async def test_a_program_of_two_megabytes_is_refused(sandbox: Sandbox) -> None:
    assert (await sandbox.run("#" * (2 << 20))).status is ToolStatus.ERROR


async def test_the_interpreter_is_ours(sandbox: Sandbox) -> None:
    result = await sandbox.run("import sys\nprint(*sys.version_info[:2])")
    assert result.text == "{} {}".format(*sys.version_info[:2])
    assert (await sandbox.run("import os\nos.getpid()")).text != str(os.getpid())


async def test_an_interpreter_that_dies_tells_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("system.tools.sandbox.server._BOOT", "raise SystemExit('bad interpreter')")
    with pytest.raises(SandboxUnavailable, match="died while starting: bad interpreter"):
        await Sandbox().start()
