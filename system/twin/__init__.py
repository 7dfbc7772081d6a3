"""The digital twin: the system's own control flow on a virtual clock, with models of engine, tools, agent and
learner.

``espalier bench twin`` is :func:`run`.
"""

from system.twin.agent import AgentModel
from system.twin.calibrate import Calibration
from system.twin.compare import run
from system.twin.dist import Constant, Dist, Empirical, Lognormal, Stragglers
from system.twin.events import TwinEvents, TwinResult
from system.twin.speeds import LinearEngine, LinearLearner
from system.twin.tools import ToolModel
from system.twin.world import Failure, Models, Twin, simulate

WORDS = "RUN …"  # takes run directories

__all__ = [
    "WORDS",
    "AgentModel",
    "Calibration",
    "Constant",
    "Dist",
    "Empirical",
    "Failure",
    "LinearEngine",
    "LinearLearner",
    "Lognormal",
    "Models",
    "Stragglers",
    "ToolModel",
    "Twin",
    "TwinEvents",
    "TwinResult",
    "run",
    "simulate",
]
