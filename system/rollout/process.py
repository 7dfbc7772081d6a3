"""What a process that grows thousands of branches sets once, before the first."""

from __future__ import annotations

import gc
import resource

COLLECT_AFTER = (
    100_000  # new container objects; the default, 700, is passed within one turn of the event loop
)


def prepare() -> None:
    """Collect cyclic garbage less often, and allow as many open files as the system grants.

    A full collection looks at every object of every library loaded, and each task or array in use is one
    more.  What exists now is set aside for good; trees are freed by reference counting, as before.  Every
    branch that generates holds a connection, and a shell's usual limit is 1,024 open files.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, 20, 20)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
