"""GRPO by TRL on a given job: what ``espalier bench trl`` runs in the environment of ``make bench-trl``.

``python -m system.bench.trl_train JOB``: ``JOB`` is a JSON file of the fields of :class:`TrlJob`.  It
uses TRL's public interface alone: GRPOTrainer with ``tools``, a chat template, a response template and a
callback.  The same model calls its tools by tags here, so the template writes tags, and a closing tag ends
the model's turn as an end token does.

Of Espalier it imports the reward, the search index and what cuts a tool's answer, which are the same code in
every way that the benchmark compares.  Everything else is TRL's.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from system.bench.trl_parts import (
    CHAT_TEMPLATE,
    CONTINUOUS,
    RESPONSE_TEMPLATE,
    TOOLS,
    TrlJob,
    branch_of,
    calculate,
)
from system.rollout.encode import fitted
from system.rollout.rewards.arpo import ArpoReward
from system.tree.prompt import Prompt


class ToolServer:
    """One connection to a server of JSON, kept open."""

    def __init__(self, url: str) -> None:
        place = urlsplit(url)
        self._connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=60)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Raises RuntimeError for an answer that is none."""
        self._connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: HTTP {answer.status}: {text[:200]!r}")
        return json.loads(text)


class Toolbox:
    """The two tools as functions that TRL calls; remembers how each answer came about, for the reward."""

    def __init__(self, job: TrlJob, tokenizer: PreTrainedTokenizerBase) -> None:
        self._job, self._tokenizer = job, tokenizer
        self.calls = 0
        self._status: dict[tuple[str, str], str] = {}
        self._find = self._searcher()
        sandbox = ToolServer(job.python_url) if job.python_url else None
        self._run = (lambda code: sandbox.post("/run", {"code": code})) if sandbox else calculate

    def _searcher(self) -> Callable[[str], list[tuple[str, str]]]:
        job = self._job
        if job.search_url:
            server = ToolServer(job.search_url)

            def ask(query: str) -> list[tuple[str, str]]:
                answer = server.post("/search", {"query": query, "top_k": job.top_k})
                return [(one["title"], one["text"]) for one in answer["results"]]

            return ask
        from system.tools.search_index import SearchIndex, read_corpus  # only where it is used

        index = SearchIndex.build(read_corpus(job.corpus))

        def look(query: str) -> list[tuple[str, str]]:
            time.sleep(job.delay_s)
            return [(hit.document.title, hit.document.text) for hit in index.search(query, job.top_k)]

        return look

    def functions(self) -> list[Callable[[str], str]]:
        def search(text: str) -> str:
            """Search a collection of documents and get the passages that match best.

            Args:
                text: what to look for
            """
            found = self._find(text)
            told = "\n".join(f"{title}: {body}" for title, body in found)
            return self._told("search", told or "No results.", "ok")

        def python(text: str) -> str:
            """Run a Python program and get what it prints and the value of its last expression.

            Args:
                text: the program
            """
            answer = self._run(text)
            return self._told("python", answer["text"], answer["status"])

        return [search, python]

    def _told(self, tool: str, text: str, status: str) -> str:
        text = fitted(self._tokenizer, text, self._job.result_tokens)
        self._status[tool, text] = status
        self.calls += 1
        return text

    def status(self, tool: str, text: str) -> str:
        return self._status.get((tool, text), "error")


class TrlScores:
    """The reward as a function that TRL calls with a whole batch; writes down what the batch was."""

    __name__ = "arpo"  # TRL names its metrics by it

    def __init__(self, tokenizer: PreTrainedTokenizerBase, toolbox: Toolbox) -> None:
        self._tokenizer, self._toolbox, self._reward = tokenizer, toolbox, ArpoReward()
        self.batch: dict[str, Any] = {}
        self.sample: dict[str, Any] = {}

    def __call__(
        self,
        completions: list[list[dict[str, Any]]],
        completion_ids: list[list[int]],
        id: list[str],
        answers: list[list[str]],
        **_: Any,
    ) -> list[float]:
        found: list[float] = []
        for messages, ids, name, gold in zip(completions, completion_ids, id, answers, strict=True):
            text = self._decoded(ids)
            branch = branch_of(text, messages, self._toolbox.status, self._shown)
            found.append(self._reward.score(Prompt(name, (), tuple(gold)), branch).value)
        self.batch = {
            "questions": [name for name, _ in groupby(id)],
            "completions": len(completions),
            "tokens": sum(map(len, completion_ids)),
            "reward": sum(found) / len(found),
        }
        longest = max(range(len(completions)), key=lambda i: len(completions[i]))
        self.sample = {
            "id": id[longest],
            "token_ids": completion_ids[longest],
            "text": self._tokenizer.decode(completion_ids[longest]),
        }
        return found

    def _shown(self, text: str) -> str:
        return self._decoded(self._tokenizer.encode(text, add_special_tokens=False))

    def _decoded(self, ids: list[int]) -> str:
        """Without end tokens, which a program may hold and an error of the tool then repeats."""
        eos = self._tokenizer.eos_token_id
        return self._tokenizer.decode([one for one in ids if one != eos])


class Steps(TrainerCallback):
    """A line for every step as it ends, so that a run that is cut short leaves what it did."""

    def __init__(self, path: Path, scores: TrlScores, toolbox: Toolbox) -> None:
        self._path, self._scores, self._toolbox = path, scores, toolbox

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        line = {
            "step": state.global_step,
            "time": time.time(),
            **self._scores.batch,
            "calls": self._toolbox.calls,
        }
        self._toolbox.calls = 0
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"step {line['step']}/{state.max_steps}  reward {line['reward']:.2f}", flush=True)


def main(path: str) -> None:
    job = TrlJob(**json.loads(Path(path).read_bytes()))
    out = Path(job.out)
    tokenizer = AutoTokenizer.from_pretrained(job.model, local_files_only=True)
    tokenizer.chat_template, tokenizer.response_template = CHAT_TEMPLATE, RESPONSE_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(job.model, local_files_only=True, dtype=torch.float32)
    ends = [tokenizer.encode(f" </{tool}>", add_special_tokens=False) for tool in TOOLS]
    if any(len(end) != 1 for end in ends):
        raise SystemExit(
            "trl_train: a closing tag is no token of its own in this tokenizer: TRL cannot stop there"
        )
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *(end[0] for end in ends)]
    toolbox = Toolbox(job, tokenizer)
    scores = TrlScores(tokenizer, toolbox)
    rows = [{"prompt": one["messages"], "id": one["id"], "answers": one["answers"]} for one in job.questions]
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=scores,
        args=settings(job),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        tools=toolbox.functions(),
        callbacks=[Steps(out / "steps.jsonl", scores, toolbox)],
    )
    trainer.train()
    trainer.save_model(str(out / "model"))
    told = tokenizer.apply_chat_template(
        [row["prompt"] for row in rows], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    wrong = [one["id"] for one, ids in zip(job.questions, told, strict=True) if list(ids) != one["token_ids"]]
    result = {
        "other_tokens": wrong,
        "sample": scores.sample,
        "threads": torch.get_num_threads(),
        "job": asdict(job) | {"questions": len(rows)},
    }
    (out / "result.json").write_text(json.dumps(result), encoding="utf-8")


def settings(job: TrlJob) -> GRPOConfig:
    """The quickstart's algorithm on linear rollouts, in TRL's words.

    Left at TRL's defaults: static ``generate``, the loss (token mean over the batch), advantages by the
    group's mean and deviation, no KL.  Not at its defaults, and faster here: float32 (bfloat16 is for GPUs),
    and no recomputation of activations in the backward pass, which saves memory that a tiny model does not
    use.
    """
    learn = job.learn
    return GRPOConfig(
        output_dir=job.out,
        max_steps=job.steps,
        per_device_train_batch_size=job.batch_leaves,
        gradient_accumulation_steps=1,
        num_generations=job.leaves,
        max_completion_length=job.tokens,
        max_tool_calling_iterations=job.calls,
        temperature=1.0,
        shuffle_dataset=False,
        use_transformers_continuous_batching=job.continuous,
        transformers_continuous_batching_config=CONTINUOUS if job.continuous else None,
        beta=0.0,
        epsilon=learn["clip_low"],
        epsilon_high=learn["clip_high"],
        learning_rate=learn["lr"],
        lr_scheduler_type="constant",
        weight_decay=learn["weight_decay"],
        adam_beta1=learn["beta1"],
        adam_beta2=learn["beta2"],
        adam_epsilon=learn["eps"],
        max_grad_norm=learn["grad_clip"],
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main(sys.argv[1])
