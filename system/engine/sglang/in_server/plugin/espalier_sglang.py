"""A plug-in of SGLang: what reinforcement learning on trees needs of a server and SGLang does not do itself.

- **Entropy.** Every answer that asked for log-probabilities brings ``meta_info["entropy"]``: per output
  token, the entropy in nats of the distribution it was sampled from, over the whole vocabulary, after
  temperature and before top-p, top-k and min-p.  The sampler of every built-in backend is replaced by a
  subclass.
- **Cache by weight version.** A prefix computed under old weights is never served as one of the new: the
  version is part of each request's key in the prefix cache, set by the scheduler when the request arrives
  and again, for requests that wait to be (re)computed, when the version changes.
- **Versions of what is still to be read.** With overlap scheduling one step's result waits to be read while
  weights change in place; its tokens are of the old weights, which SGLang counts as of the new ones.  A pause
  waits for that step, so that no weight changes under it.
- **Versions while streaming.** Every message of a stream says which of its tokens were made by which weight
  version.  SGLang itself says so in the last message only; the others carry the version of the moment at
  which they are sent, which may be newer than their tokens.
- **Weight groups with a deadline.** A process group that brings weights waits at most
  ``ESPALIER_GROUP_DEADLINE_S`` for its members and for one bucket; SGLang would wait for ten to thirty
  minutes, and stand still that long, because another server hangs.
- **Proof of float8 weights.** SGLang's weight checker gives digests of what a server computes with.  Where
  that is float8 (``--quantization fp8 --load-format flash_rl``) nobody outside can tell it beforehand; so
  each rank says of these matrices what came to be quantised: the digest of every tensor, whole, as it was
  handed to the loader.
- **Start paused.** With ``ESPALIER_START_PAUSED=1`` the server answers, but generates nothing before
  ``/continue_generation``: one that was restarted has forgotten the weights it was sent.

- **Key.** ``ESPALIER_KEY`` becomes SGLang's ``api_key``, which every call but those of health must then
  show; a flag would stand on the command line, for all users of the machine to read.  It is left out of what
  the server logs and tells about its settings.

``/server_info`` tells that the plug-in is there: its internal states have ``espalier: true``.

SGLang loads it by its entry point in the group ``sglang.srt.plugins``, in each of its processes.
"""

import os
import time
from datetime import timedelta

import torch

QUANTISED = tuple(f".{one}_proj.weight" for one in ("q", "k", "v", "o", "gate", "up", "down"))
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
ROWS = 64  # distributions whose entropies are computed at once: bounds the memory this takes


def register():
    """Called by SGLang in each of its processes."""
    from sglang.srt.arg_groups.choices import BUILT_IN_SAMPLING_BACKENDS
    from sglang.srt.layers.sampler import register_sampler_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for backend in BUILT_IN_SAMPLING_BACKENDS:
        register_sampler_backend(backend, _entropy_sampler)
    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    HookRegistry.register(f"{scheduler}.handle_generate_request", _key_arriving, HookType.BEFORE)
    HookRegistry.register(f"{scheduler}.record_weight_version_change", _count_unread, HookType.AROUND)
    HookRegistry.register(f"{scheduler}.record_weight_version_change", _key_waiting, HookType.AFTER)
    HookRegistry.register(f"{scheduler}.pause_generation", _settle, HookType.AFTER)
    HookRegistry.register(f"{scheduler}.get_internal_state", _introduce, HookType.AFTER)
    streamer = "sglang.srt.managers.scheduler_components.output_streamer._GenerationStreamAccumulator"
    HookRegistry.register(f"{streamer}.accept", _stamp, HookType.AFTER)
    updater = "sglang.srt.model_executor.model_runner_components.weight_updater"
    HookRegistry.register(f"{updater}.init_custom_process_group", _bounded, HookType.BEFORE)
    receive = f"{updater}.WeightUpdater._receive_bucketed_weights_from_distributed"
    HookRegistry.register(receive, _received, HookType.AFTER)
    loader = "sglang.srt.model_loader.loader.QuantizedRLModelLoader.rebinding_and_load_weights"
    HookRegistry.register(loader, _keep_given, HookType.BEFORE)
    checker = "sglang.srt.utils.weight_checker.WeightChecker._compute_checksum"
    HookRegistry.register(checker, _tell_given, HookType.AFTER)
    cache = "sglang.srt.state_capturer.base.BaseHostCache"
    HookRegistry.register(f"{cache}.__init__", _pageable, HookType.BEFORE)
    if key := os.environ.get("ESPALIER_KEY"):
        settings = "sglang.srt.server_args.ServerArgs"
        HookRegistry.register(f"{settings}.resolve_once", lambda args: _lock(args, key), HookType.BEFORE)
        HookRegistry.register(f"{settings}.resolved_dict", _hide_key, HookType.AFTER)
    if os.environ.get("ESPALIER_START_PAUSED") == "1":
        manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
        HookRegistry.register(f"{manager}.init_weight_update", _pause, HookType.AFTER)


def _group_deadline_s():
    return float(os.environ.get("ESPALIER_GROUP_DEADLINE_S", "60"))


def _bounded(*args, **kwargs):
    # On NCCL `_received` looks first: its own watchdog ends the process.
    patience = 2 if kwargs.get("backend") == "nccl" else 1
    return args, {**kwargs, "timeout": timedelta(seconds=patience * _group_deadline_s())}


def _received(result, updater, *, group_name, **_):
    """NCCL only queues a broadcast: wait until it is there, or give it up, for which the server lives on."""
    if updater.device != "cuda":
        return
    arrived, began = torch.cuda.Event(), time.monotonic()
    arrived.record()
    while not arrived.query():
        if time.monotonic() - began > _group_deadline_s():
            updater._model_update_group[group_name].abort()
            raise RuntimeError(f"no bucket of weights within {_group_deadline_s():g} s")
        time.sleep(0.0005)


def _keep_given(model, load, weights):
    """Digests of the tensors that are to be quantised, by their names in files, until the next ones come."""
    from sglang.srt.managers.mm_utils import tensor_hash

    weights, own = list(weights), next(model.parameters())
    given = model.__dict__.setdefault("espalier_given", {})
    for name, tensor in weights:
        if name.endswith(QUANTISED):
            given[name] = f"{tensor_hash(tensor.to(own.device)):016x}"
    return (model, load, weights), {}


def _tell_given(result, checker, *args, **kwargs):
    """In place of float8 matrices and their scales: what they were made of."""
    model = checker._get_model()
    if not hasattr(model, "original_weights_rebuild_keys"):  # which SGLang's float8 loader keeps
        return None
    parameters = dict(model.named_parameters())
    coded = {name for name, one in parameters.items() if one.dtype in FLOAT8}
    coded |= {name.removesuffix("weight") + "weight_scale" for name in coded}
    kept = {name: digest for name, digest in result["checksums"].items() if name not in coded}
    return {**result, "checksums": kept | getattr(model, "espalier_given", {})}


def _pageable(*args, **kwargs):
    """SGLang pins the host's record of experts for copies from a GPU, which without CUDA is an error."""
    from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS

    if kwargs["device"] == "cpu":
        ALLOC_MEMORY_FUNCS["cpu"] = lambda dims, dtype, device, **_: torch.empty(
            dims, dtype=dtype, device=device
        )
    return args, kwargs


def _lock(args, key):
    if args.api_key != key:  # afterwards it is resolved, and read-only
        args.api_key = key


def _hide_key(result, args):
    return {**result, "api_key": "<hidden>"}


def _pause(result, manager):
    manager.is_pause = True


def _introduce(result, scheduler, *args, **kwargs):
    result.internal_state["espalier"] = True


def _stamp(result, streamer, *, req):
    import espalier_adapters
    from sglang.srt.utils.weight_versions import compute_weight_version_spans

    if not (streamer.rids and streamer.rids[-1] == req.rid):
        return
    tokens = streamer.completion_tokens[-1]
    if (own := espalier_adapters.spans(req, tokens)) is not None:
        streamer.weight_versions[-1] = own
    elif streamer.weight_versions[-1] is None:
        streamer.weight_versions[-1] = compute_weight_version_spans(
            req.weight_version_events,
            current_version=streamer.current_weight_version,
            num_output_tokens=tokens,
        )


def _count_unread(change, scheduler, new_version):
    from sglang.srt.runtime_context import get_serving
    from sglang.srt.utils.weight_versions import WeightVersionEvent

    old = get_serving().weight_version
    change(scheduler, new_version)
    if get_serving().weight_version == old:
        return
    for batch, _ in getattr(scheduler, "result_queue", ()):  # at most one
        for request in batch.reqs:
            if not (request.finished() or request.is_retracted or request.inflight_middle_chunks > 0):
                event = WeightVersionEvent(old_version=old, num_output_tokens=len(request.output_ids) + 1)
                request.weight_version_events.append(event)


def _settle(result, *args, **kwargs):
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _key_arriving(scheduler, received, *args, **kwargs):
    received.extra_key = _keyed(received.extra_key)


def _key_waiting(result, scheduler, *args, **kwargs):
    for request in scheduler.waiting_queue:  # new ones, and running ones that were retracted
        request.extra_key = _keyed(request.extra_key)


def _keyed(extra_key):
    """``extra_key`` under the weights that are served now, whatever version it named before."""
    from sglang.srt.runtime_context import get_serving

    own = extra_key.split(";", 1)[1] if extra_key and extra_key.startswith("weights=") else extra_key
    return f"weights={get_serving().weight_version};{own or ''}"


def _entropy_sampler():
    from sglang.srt.layers.sampler import Sampler

    class EntropySampler(Sampler):
        """SGLang's sampler, which says for each row how uncertain its choice was."""

        def forward(self, logits_output, sampling_info, return_logprob, *args, **kwargs):
            held = None
            if return_logprob:  # before sampling, which overwrites the logits
                temperatures = None if sampling_info.is_all_greedy else sampling_info.temperatures
                held = Deferred(entropies(logits_output.next_token_logits, temperatures))
            chosen = super().forward(logits_output, sampling_info, return_logprob, *args, **kwargs)
            if held is not None:
                logits_output.customized_info = {**(logits_output.customized_info or {}), "entropy": held}
            return chosen

    return EntropySampler()


def entropies(logits, temperatures):
    """[rows] entropy in nats of softmax(logits / temperatures), of [rows, vocabulary] logits.

    ``temperatures``: [rows, 1], or None for temperature 1, which is what greedy decoding reports its
    log-probabilities at.  A token whose logit is -inf has no part in the distribution.
    """
    found = []
    for at in range(0, logits.shape[0], ROWS):
        rows = logits[at : at + ROWS].float()
        if temperatures is not None:
            rows = rows / temperatures[at : at + ROWS]
        found.append(torch.special.entr(torch.softmax(rows, -1)).sum(-1))
    return torch.cat(found) if found else logits.new_zeros(0, dtype=torch.float32)


class Deferred:
    """Numbers on their way from the device: read, and waited for, only when the scheduler asks for one.

    The copy runs behind the sampling of the same step on the same stream.  SGLang reads results after it has
    waited for that step, so nothing waits here.
    """

    def __init__(self, values):
        self._numbers = None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._host, self._copied = values, None

    def __getitem__(self, row):
        if self._numbers is None:
            if self._copied is not None:
                self._copied.synchronize()
            self._numbers = self._host.tolist()
        return self._numbers[row]
