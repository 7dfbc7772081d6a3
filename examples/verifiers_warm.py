"""The questions of verifiers_search.py, and what a tiny new model needs besides: a tokenizer, demonstrations.

With ``model.path`` set to a model of your own, ``task: verifiers`` is all.
"""

from system.tasks.quickstart.task import QuickstartTask
from system.tasks.verifiers import VerifiersTask


class Warm(VerifiersTask):
    def __init__(self, config):
        super().__init__(config)
        self.quickstart = QuickstartTask(config)

    def tokenizer(self):
        return self.quickstart.tokenizer()

    def demonstrations(self, n, seed):
        return self.quickstart.demonstrations(n, seed)
