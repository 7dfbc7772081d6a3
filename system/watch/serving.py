"""``espalier watch``: from the command to the server's end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from system.errors import DONE, ConfigError
from system.serving import stop_signals
from system.watch.demo import unpacked
from system.watch.server import start


def run(args: argparse.Namespace) -> int:
    """Serve until a signal."""
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
        print(*told(address, local=host == "127.0.0.1"), sep="\n", flush=True)
        if browse:
            webbrowser.open(address)
        await stopped.wait()
    finally:
        await server.close()


def told(address: str, *, local: bool) -> list[str]:
    """What is said of the address, in lines."""
    parts, me = urlsplit(address), os.uname().nodename
    lines = [f"open {address}"]
    if local:
        who, port = os.environ.get("USER", "USER"), parts.port
        lines.append(f"from another machine, first: ssh -L {port}:127.0.0.1:{port} {who}@{me}")
    else:
        lines.append("it is open to the network, unencrypted: who has the address can read the run")
    return [*lines, "Ctrl-C ends it"]
