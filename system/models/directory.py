"""Whether a directory holds a whole model in Hugging Face format: its files, read by their headers alone.

Needs neither torch nor transformers, so that a model of any size is looked at in well under a second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from system.models.float8 import STORED, Float8, is_scale
from system.models.reading import UnsupportedModel
from system.models.shape import ModelShape

INDEX = "model.safetensors.index.json"  # which file holds which tensor, where there are several
SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "BF16", "F16")  # safetensors' names of the number formats that need no scale
_POINTER = b"version https://git-lfs"
COMPUTED = "rotary_emb.inv_freq"  # in files of early Llamas, which save what the configuration says
_MOST_HEADER = 100 << 20  # bytes; safetensors' own limit
_PIECE, _PIECES = 64 << 10, 64  # bytes, and how many of them two large tensors are compared by


def weight_files(directory: str | Path) -> dict[str, str]:
    """Tensor name -> name of the file that holds it.

    Raises :class:`~system.models.reading.UnsupportedModel` when there are no safetensors weights, or not all,
    and for an index that does not agree with the files.
    """
    root = Path(directory)
    if indexed := (root / INDEX).is_file():
        where = _index(root / INDEX)
    elif (root / SINGLE).is_file():
        where = dict.fromkeys(header(root / SINGLE), SINGLE)
    else:
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in root.glob(pattern))
        found = f"; {others[0]} is another format: save the model with safetensors" if others else ""
        raise UnsupportedModel(f"{root}: no safetensors weights ({SINGLE} or {INDEX}){found}")
    for name in sorted(set(where.values())):
        if not (root / name).is_file():
            raise UnsupportedModel(f"{root / name} is missing: {INDEX} names it; download it again")
    if indexed:
        _check_index(root, where)
    return where


def _check_index(root: Path, where: Mapping[str, str]) -> None:
    """Is each tensor in the file that the index names, and in no other?  One of two would be as good as the
    other: which is read would be chance.
    """
    held: dict[str, str] = {}
    for file in sorted(set(where.values())):
        for name in header(root / file):
            if name in held:
                raise UnsupportedModel(
                    f"{root}: {name} is in {held[name]} and in {file}: take out what is not the model's"
                )
            held[name] = file
    for name, file in where.items():
        if held.get(name) != file:
            found = f"it is in {held[name]}" if name in held else "no file has it"
            raise UnsupportedModel(
                f"{root / INDEX} names {file} for {name}, and {found}: download index and files again"
            )


def header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {dtype, shape, data_offsets} of a safetensors file that is as long as it says.

    Raises :class:`~system.models.reading.UnsupportedModel` otherwise.
    """
    with path.open("rb") as file:
        start = file.read(8)
        if _POINTER.startswith(start) and start:
            raise UnsupportedModel(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`")
        length = int.from_bytes(start, "little")
        text = file.read(length) if len(start) == 8 and length <= _MOST_HEADER else b""
    try:
        found: dict[str, dict[str, Any]] = json.loads(text)
        found.pop("__metadata__", None)
        end = 8 + length + max((int(one["data_offsets"][1]) for one in found.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise UnsupportedModel(f"{path} is damaged: not a safetensors file; download it again") from error
    if (size := path.stat().st_size) < end:
        raise UnsupportedModel(f"{path} is cut off: {size} of {end} bytes; download it again")
    return found


def fast_tokenizer(file: Path) -> Any:
    """The ``tokenizers.Tokenizer`` of a ``tokenizer.json``, read once: a large one takes half a second.

    Raises ValueError for one that cannot be read.
    """
    found = file.stat()
    return _fast_tokenizer(str(file.resolve()), (found.st_mtime_ns, found.st_size))


@lru_cache(maxsize=2)
def _fast_tokenizer(file: str, _state: tuple[int, int]) -> Any:
    from tokenizers import Tokenizer  # only here

    try:
        return Tokenizer.from_file(file)
    except Exception as error:  # the library has no kind of its own
        raise ValueError(str(error)) from error


def end_tokens(directory: str | Path) -> set[int]:
    """End-of-sequence ids that the generation config, the model config or the tokenizer name."""
    root, found = Path(directory), set[int]()
    for file in ("generation_config.json", "config.json"):
        if (root / file).is_file():
            value: Any = json.loads((root / file).read_bytes()).get("eos_token_id")
            found.update(one for one in (value if isinstance(value, list) else [value]) if type(one) is int)
    settings, vocabulary = root / "tokenizer_config.json", root / "tokenizer.json"
    if settings.is_file() and vocabulary.is_file():
        token: Any = json.loads(settings.read_bytes()).get("eos_token")
        if text := token.get("content") if isinstance(token, dict) else token:
            index: int | None = fast_tokenizer(vocabulary).token_to_id(text)
            found.update([] if index is None else [index])
    return found


def chat_template(directory: str | Path) -> str:
    """The chat template of the tokenizer, of several all; empty for none that can be read."""
    root = Path(directory)
    if (file := root / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    try:
        found: Any = json.loads((root / "tokenizer_config.json").read_bytes()).get("chat_template")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""  # which has been told elsewhere
    several = found if isinstance(found, list) else []
    return found if isinstance(found, str) else "\n".join(str(one) for one in several)


def faults(directory: str | Path) -> Iterator[str]:
    """What keeps the model in ``directory`` from being trained here: each a line with its remedy.

    Looks at the configuration, at every weight file's header and length, and at the tokenizer.
    """
    root = Path(directory)
    try:
        shape = ModelShape.from_directory(root)
        yield from _weight_faults(root, shape)
    except (UnsupportedModel, OSError) as error:
        yield str(error)
    yield from _tokenizer_faults(root)


def _weight_faults(root: Path, shape: ModelShape) -> Iterator[str]:
    where = weight_files(root)
    held: dict[str, dict[str, Any]] = {}
    for file in sorted(set(where.values())):
        held |= {name: {**one, "file": root / file} for name, one in header(root / file).items()}
    if shape.layers > len(held):  # before a nonsensical number of names is made
        yield f"{root}: config.json says {shape.layers} layers, the weights have {len(held)} tensors"
        return
    wanted, float8 = shape.tensors(), Float8.of_directory(root)
    if missing := sorted(wanted.keys() - held.keys()):
        yield f"{root}: {len(missing)} tensors are missing, first {missing[0]}; download the model again"
        return
    for name, size in wanted.items():
        given, kind = tuple(held[name].get("shape", ())), held[name].get("dtype")
        if kind == STORED and float8 is not None:
            if fault := _scale_fault(float8, name, held):
                yield f"{root}: {fault}"
                return
        elif kind not in FLOATS:
            yield (
                f"{root}: {name} holds {kind}, which config.json does not explain; use the model's float32 "
                "or bfloat16 weights"
            )
            return
        if given != size:
            yield f"{root}: {name} has shape {list(given)}, config.json says {list(size)}: correct either"
            return
    if fault := _placeless(shape, held.keys(), float8) or _other_head(shape, held):
        yield f"{root}: {fault}"


def _placeless(shape: ModelShape, held: Collection[str], float8: Float8 | None) -> str:
    """What is wrong with tensors that the model of config.json has no place for; empty: there are none."""
    known = {*shape.tensors(), shape.tensor("head")}
    extra = sorted(
        name
        for name in held
        if name not in known and not name.endswith(COMPUTED) and not (float8 is not None and is_scale(name))
    )
    if not extra:
        return ""
    layer = re.compile(re.escape(shape.family.names["layer"]).replace(r"\{\}", r"(\d+)"))
    numbers = [int(match[1]) for name in extra if (match := layer.match(name))]
    if numbers and max(numbers) >= shape.layers:
        return (
            f"the weights have {max(numbers) + 1} layers, config.json says {shape.layers}: correct "
            "num_hidden_layers, or take the others' tensors out of the files"
        )
    return (
        f"{len(extra)} tensors have no place in the {shape.family.name} of config.json, first {extra[0]}; "
        "they would be left out: correct config.json, or take them out of the files"
    )


def _other_head(shape: ModelShape, held: Mapping[str, dict[str, Any]]) -> str:
    """What is wrong with an output head beside an embedding that is to be it; empty: nothing.

    Where both are large, pieces of them are compared; all of it, when the weights are read.
    """
    embedding, head = shape.tensor("embedding"), shape.tensor("head")
    if not shape.tied or head not in held:
        return ""
    one, other = held[embedding], held[head]
    if one["dtype"] != other["dtype"] and one["shape"] == other["shape"]:
        return ""  # rounded otherwise, they may be the same
    same = one["shape"] == other["shape"] and all(
        first == second for first, second in zip(_pieces(one), _pieces(other), strict=True)
    )
    return "" if same else untied(head, embedding)


def untied(head: str, embedding: str) -> str:
    """What to say of a tied model whose files hold another output head."""
    return (
        f"config.json says tie_word_embeddings true, and {head} is not {embedding}; it would be left out: "
        f"set tie_word_embeddings to false, or take {head} out of the files"
    )


def _pieces(tensor: Mapping[str, Any]) -> Iterator[bytes]:
    """The bytes of a tensor: all of a small one, evenly spread pieces of a large one."""
    begin, end = map(int, tensor["data_offsets"])
    apart = max(_PIECE, (end - begin - _PIECE) // (_PIECES - 1))
    with open(tensor["file"], "rb") as file:
        data = 8 + int.from_bytes(file.read(8), "little")
        for at in range(begin, end, apart):
            file.seek(data + at)
            yield file.read(min(_PIECE, end - at))


def _scale_fault(float8: Float8, name: str, held: Mapping[str, dict[str, Any]]) -> str:
    try:
        scale = held[float8.scale_name(name, held)]
        float8.shared(name, tuple(held[name]["shape"]), tuple(scale["shape"]))
    except UnsupportedModel as error:
        return str(error)
    if scale["dtype"] in FLOATS:
        return ""
    return f"{name} has a scale of {scale['dtype']}; supported: {', '.join(FLOATS)}"


def _tokenizer_faults(root: Path) -> Iterator[str]:
    """A fast tokenizer is loaded (a tenth of a second); of a slow one the files must be there."""
    remedy = "copy it from the model's source (tokenizer.json, tokenizer_config.json)"
    whole = root / "tokenizer.json"
    if whole.is_file():
        try:
            fast_tokenizer(whole)
        except ValueError as error:
            yield f"{whole} cannot be loaded ({error}); {remedy}"
    elif not (root / "tokenizer.model").is_file() and not (
        (root / "vocab.json").is_file() and (root / "merges.txt").is_file()
    ):
        yield f"{root} has no tokenizer; {remedy}"
    if (settings := root / "tokenizer_config.json").is_file():
        try:
            json.loads(settings.read_bytes())
        except (ValueError, RecursionError) as error:
            yield f"{settings} is not JSON ({error}); {remedy}"


def _index(path: Path) -> dict[str, str]:
    """The index's tensors and files.  A file's name is a plain one: an index leads nowhere else."""
    try:
        where: Any = json.loads(path.read_bytes())["weight_map"]
        sound = isinstance(where, Mapping) and all(_plain(name) for name in where.values())
    except (ValueError, TypeError, KeyError, RecursionError):
        where, sound = {}, False
    if not sound or not where:
        raise UnsupportedModel(f"{path} is damaged: not an index of weight files; download it again")
    return dict(where)


def _plain(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name
