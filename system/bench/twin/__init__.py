"""The digital twin: the system's own control flow on a virtual clock, with models of engine, tools, agent and
learner.

``espalier bench twin`` is :func:`run`.
"""

from system.bench.twin.agent import AgentModel
from system.bench.twin.books import TwinBooks, TwinResult
from system.bench.twin.calibrate import Calibration
from system.bench.twin.compare import run
from system.bench.twin.dist import Constant, Dist, Empirical, Lognormal, Stragglers
from system.bench.twin.speeds import LinearEngine, LinearLearner
from system.bench.twin.tools import ToolModel
from system.bench.twin.world import Failure, Models, Twin, simulate

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
    "TwinBooks",
    "TwinResult",
    "run",
    "simulate",
]
