"""A tool of one's own.  In the directory of this file, or with it on PYTHONPATH:

espalier train ../configs/quickstart.yaml tools.names=[search,python,weekday_tool:Weekday]
"""

from datetime import date

from system.tools.outcome import ToolOutcome, ToolSpec, ToolStatus


class Weekday:
    schema = {"type": "object", "properties": {"date": {"type": "string"}}, "required": ["date"]}  # noqa: RUF012
    spec = ToolSpec("weekday", "The weekday of a date (2026-01-31).", schema, primary="date", pure=True)

    async def run(self, arguments, context):
        day = date.fromisoformat(arguments["date"].strip())  # what it raises, the model is told
        return ToolOutcome(ToolStatus.OK, f"{day:%A}")

    async def check(self):
        """Nothing has to be there for it."""
