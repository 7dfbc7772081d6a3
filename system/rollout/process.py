"""What a process that grows thousands of branches sets once, before the first."""

from __future__ import annotations

import gc
import resource

COLLECT_AFTER = 100_000  # new container objects; the default of 700 comes several times a loop turn
OPEN_FILES = 65_536  # at most; some systems answer "unlimited" and then refuse it


def prepare() -> None:
    """Collect cyclic garbage less often, and allow enough open files, as far as the system grants them.

    A full collection looks at every object of every library loaded, and each task or array in use is one
    more.  What exists now is set aside for good; trees are freed by reference counting, as before.  Every
    branch that generates holds a connection, and a shell's usual limit is 1,024 open files.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, 20, 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
