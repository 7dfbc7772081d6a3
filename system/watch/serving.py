"""``espalier watch``: from the command to the server's end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import html
import os
import tempfile
import threading
import webbrowser
from collections.abc import Generator, Sequence
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from system.errors import DONE, ConfigError
from system.serving import stop_signals
from system.watch.demo import unpacked
from system.watch.server import start


def run(args: argparse.Namespace) -> int:
    """Serve until a signal."""
    if not 0 <= args.port < 1 << 16:
        raise ConfigError(f"--port {args.port}: a port is 1 to 65535, or 0 for a free one")
    with contextlib.ExitStack() as held:
        runs = list(args.runs)
        if args.demo:
            runs.append(held.enter_context(unpacked()))
        if not runs:
            raise ConfigError(
                "name a run directory: espalier watch runs/quickstart-s0; or --demo to look around"
            )
        asyncio.run(_serve(runs, args.host, args.port, browse=args.open))
    return DONE


async def _serve(runs: Sequence[Path], host: str, port: int, *, browse: bool) -> None:
    stopped = stop_signals()
    try:
        server, address = await start(runs, host, port)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {error.strerror}: name another --port"
        ) from error
    try:
        print(*told(address, local=_loopback(host)), sep="\n", flush=True)
        with _leading_to(address) as page:
            if browse:  # in a thread: a browser of the terminal goes on until it is left
                threading.Thread(target=webbrowser.open, args=(page.as_uri(),), daemon=True).start()
            await stopped.wait()
    finally:
        await server.close()


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def _leading_to(address: str) -> Generator[Path]:
    """A page, readable by this user alone, that leads to ``address``: what a browser is started with is shown
    to all users of a machine, and the address holds the key.
    """
    with tempfile.TemporaryDirectory() as directory:
        page = Path(directory) / "watch.html"
        page.touch(mode=0o600)
        page.write_text(f'<!doctype html><meta http-equiv="refresh" content="0;url={html.escape(address)}">')
        yield page


def told(address: str, *, local: bool) -> list[str]:
    """What is said of the address, in lines."""
    parts, me, who = urlsplit(address), os.uname().nodename, os.environ.get("USER", "USER")
    port, end = parts.port, "Ctrl-C ends it"
    if local:
        there = f"from another machine, first: ssh -L {port}:127.0.0.1:{port} {who}@{me}"
        return [f"open {address}", there, end]
    if ip_address(parts.hostname or "").is_unspecified:  # no address that one could open elsewhere
        address = parts._replace(netloc=f"{me}:{port}").geturl()
    return [
        f"open {address}",
        "others can reach it from the network, unencrypted: who has or overhears this address, and its key, "
        "can read the run",
        f"without --host only this machine can, and who comes by: ssh -L PORT:127.0.0.1:PORT {who}@{me}",
        end,
    ]
