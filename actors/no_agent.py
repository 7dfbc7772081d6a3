"""In place of one of Ray's agents, of which nobody here asks anything: waits for the end of the raylet.

A raylet starts two agents and ends with either of them (:mod:`.local_ray`); ``cluster.ray_agents=true`` has
them back.  A script of the standard library
alone; its arguments are those of the agent.
"""

import os
import sys
import time

LOOK_S = 1.0


def main() -> None:
    raylet = os.getppid()
    sys.stdin.buffer.read()  # the raylet's pipe, which ends with it
    while os.getppid() == raylet:  # where RAY_enable_pipe_based_agent_to_parent_health_check=0 gives none
        time.sleep(LOOK_S)


if __name__ == "__main__":
    main()
