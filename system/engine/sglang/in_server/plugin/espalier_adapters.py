"""A plug-in of SGLang for adapters (LoRA) whose versions follow one another while requests run.

The learner loads each version of its adapters under a name that begins with ``v``, the version and ``-``
(``v12-3c9e…``); what follows is a digest, and tells versions of different runs apart.

- **The newest by default.** A request that names no adapter runs with the one that was loaded last, from its
  beginning to its end: chosen in the server, so that no client has to know what it holds.
- **Versions of adapters.** Every message of a stream says that its tokens are of the adapter's version, where
  SGLang would tell the version of the weights that the server holds by then.
- **Loaded twice.** A name that is loaded already becomes the newest again; SGLang would refuse it, and a
  learner that has missed an answer could not go on.
- **In use.** Unloading an adapter that requests run with is refused.  SGLang would wait for them, under a
  lock that the next load needs.

SGLang loads it by its entry point in the group ``sglang.srt.plugins``, in each of its processes.
"""

_VERSIONS = {}  # in a scheduler: id of a loaded adapter -> its version, as text


def register():
    """Called by SGLang in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
    HookRegistry.register(f"{manager}._validate_and_resolve_lora", _name_newest, HookType.BEFORE)
    HookRegistry.register(f"{manager}.load_lora_adapter_from_tensors", _load, HookType.AROUND)
    HookRegistry.register(f"{manager}.unload_lora_adapter", _unload, HookType.AROUND)
    scheduler = "sglang.srt.managers.scheduler"
    HookRegistry.register(f"{scheduler}.Scheduler.load_lora_adapter_from_tensors", _learn, HookType.AFTER)
    HookRegistry.register(f"{scheduler}.Scheduler.unload_lora_adapter", _forget, HookType.AFTER)
    HookRegistry.register(f"{scheduler}._make_abort_req", _stamp_aborted, HookType.AFTER)


# In the tokenizer manager


def _name_newest(manager, obj):
    newest = getattr(manager, "espalier_newest", None)
    if newest is not None and not obj.lora_path:
        obj.lora_path = newest if obj.is_single else [newest] * obj.batch_size


async def _load(load, manager, obj, request=None):
    from sglang.srt.managers.io_struct import LoRAUpdateOutput

    held = manager.lora_registry.get_all_adapters() if manager.enable_lora else {}
    if obj.lora_name in held:
        result = LoRAUpdateOutput(success=True, loaded_adapters=dict.fromkeys(held, ""))
    else:
        result = await load(manager, obj, request)
    if result.success:
        manager.espalier_newest = obj.lora_name
    return result


async def _unload(unload, manager, obj, request=None):
    from sglang.srt.managers.io_struct import LoRAUpdateOutput

    held = manager.lora_registry.get_all_adapters().get(obj.lora_name) if manager.enable_lora else None
    if held is not None and (uses := manager.lora_registry._counters[held.lora_id].value()):
        return LoRAUpdateOutput(success=False, error_message=f"{obj.lora_name}: in use by {uses} requests")
    return await unload(manager, obj, request)


# In a scheduler


def _learn(result, scheduler, received):
    version = received.lora_name.partition("-")[0].removeprefix("v")
    if result.success and version.isdigit():
        _VERSIONS[received.lora_id] = version


def _forget(result, scheduler, received):
    if result.success:
        _VERSIONS.pop(received.lora_id, None)


def spans(request, tokens):
    """The version spans of ``tokens`` output tokens of a request; None: it has no adapter of ours."""
    from sglang.srt.utils.weight_versions import WeightVersionSpan

    version = _VERSIONS.get(request.lora_id)
    return None if version is None else [WeightVersionSpan(version=version, start=0, end=tokens)]


def _stamp_aborted(result, request, *args, **kwargs):
    if (own := spans(request, len(request.output_ids))) is not None:
        result.weight_versions = own
