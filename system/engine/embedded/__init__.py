"""The embedded engine: a small server of our own for dense models that speaks SGLang's
protocol.
"""

from system.engine.embedded.server import EmbeddedEngine

__all__ = ["EmbeddedEngine"]
