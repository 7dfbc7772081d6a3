"""The built-in task of the quickstart."""

from system.tasks.quickstart.task import QuickstartTask

__all__ = ["QuickstartTask"]
