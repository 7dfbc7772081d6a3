"""Machines that lack a mechanism, as containers and older kernels do: imitated by a filter on the parent."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from system.tools.sandbox.sandbox import Sandbox, SandboxUnavailable

ROOT = Path(__file__).parents[2]

# Deny the system calls named as arguments, start a sandbox, print its mechanisms or why it did not start.
SCRIPT = """
import asyncio, errno, os, struct, sys
from system.tools.sandbox import kernel
from system.tools.sandbox.sandbox import Sandbox, SandboxUnavailable

NUMBERS = {"landlock": 444, "unshare": {"x86_64": 272, "aarch64": 97}[kernel.MACHINE], "mount_setattr": 442}
code = [(0x20, 0, 0, 0)]
for name in sys.argv[1:]:
    if name == "seccomp":
        code += [(0x15, 0, 3, {"x86_64": 157, "aarch64": 167}[kernel.MACHINE]), (0x20, 0, 0, 16),
                 (0x15, 0, 1, 22), (0x06, 0, 0, 0x00050000 | errno.EINVAL), (0x20, 0, 0, 0)]
    else:
        code += [(0x15, 0, 1, NUMBERS[name]), (0x06, 0, 0, 0x00050000 | errno.ENOSYS)]
code.append((0x06, 0, 0, 0x7FFF0000))
kernel.no_new_privileges()
kernel.install_filter(b"".join(struct.pack("HBBI", *instruction) for instruction in code))

async def main():
    box = Sandbox()
    try:
        await box.start()
        assert (await box.run("6 * 7")).text == "42"
        print("STARTED", *box.mechanisms)
    except SandboxUnavailable as error:
        print("UNAVAILABLE", error)
    finally:
        await box.close()

asyncio.run(main())
"""


async def start_without(*denied: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SCRIPT, *denied),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, stderr.decode()
    return stdout.decode()


async def permitted(*, namespaces: bool) -> bool:
    """Whether this machine itself permits a way of confinement."""
    box = Sandbox(namespaces=namespaces)
    try:
        await box.start()
    except SandboxUnavailable:
        return False
    finally:
        await box.close()
    return True


async def test_without_namespaces() -> None:
    if not await permitted(namespaces=False):
        pytest.skip("no Landlock here")
    told = await start_without("unshare")
    assert told.startswith("STARTED")
    assert "Landlock" in told
    assert "namespaces" not in told


async def test_without_landlock() -> None:
    if not await permitted(namespaces=True):
        pytest.skip("no namespaces here")
    told = await start_without("landlock")
    assert told.startswith("STARTED")
    assert "namespaces" in told
    assert "Landlock" not in told


async def test_on_a_kernel_before_mount_setattr_landlock_is_used() -> None:
    if not await permitted(namespaces=False):
        pytest.skip("no Landlock here")
    told = await start_without("mount_setattr")
    assert told.startswith("STARTED")
    assert "namespaces" not in told


async def test_without_either_it_does_not_start_and_says_why() -> None:
    told = await start_without("unshare", "landlock")
    assert told.startswith("UNAVAILABLE python cannot be sandboxed here")
    assert "with namespaces: OSError: [Errno 38] unshare" in told
    assert "with Landlock and seccomp: OSError: no Landlock in this kernel" in told


async def test_without_seccomp_it_does_not_start() -> None:
    told = await start_without("seccomp")
    assert told.startswith("UNAVAILABLE")
    assert "PR_SET_SECCOMP" in told
