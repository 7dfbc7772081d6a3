"""The digital twin: the system's own control flow on a virtual clock, with models of engine, tools, agent and
learner (:mod:`system.twin.world` is where it starts; ``espalier bench twin`` compares it with real runs).
"""
