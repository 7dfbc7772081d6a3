"""Tasks for ``espalier study``: where the model is unsure follows from the task, not from demonstrations.

The expert that warms the model up is as likely to be right wherever it chooses, by one
:class:`system.tasks.skill.Skill`: what it shows marks no place.  (It also has the quickstart's habit of
slipping to the next option.  Without it what it does most is right, and greedy answers are right before any
training.)  What a model is unsure of afterwards is what it has not learned, or what nobody could know there:
which of two namesakes is meant.
"""
