"""Uploading a model to a hub that speaks Hugging Face's protocol."""

from __future__ import annotations

import os
import re
from pathlib import Path

from system.errors import EspalierError
from system.text import one_line

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class PushFailed(EspalierError):
    """The hub did not take the model, which stays where it is."""


def problem(repository: str) -> str:
    """Why nothing can be uploaded to ``repository``, with the remedy, as far as this machine knows; "" for
    nothing.
    """
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode

    if not REPOSITORY.fullmatch(repository):
        return f"{repository!r} is no repository: write it as owner/name"
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set: unset it, or upload later with espalier export RUN --push NAME"
    if not get_token():
        return "there is no token: set HF_TOKEN, or log in with `hf auth login`"
    return ""


def push(directory: Path, repository: str, *, public: bool = False) -> str:
    """Upload the files of ``directory``, of one model, as a commit; returns the repository's address.

    The repository is made if it is not there: one that only its owner sees, unless ``public``.  An existing
    one keeps who sees it.  Address and token are Hugging Face's own (``HF_ENDPOINT``, ``HF_TOKEN``).
    Raises :class:`PushFailed` saying what the hub says; :func:`problem` knows beforehand what is wrong here.
    """
    from huggingface_hub import HfApi  # a second of imports

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Upload model")
    except Exception as error:  # of the hub, the network or the files: the library has no kind of its own
        raise PushFailed(f"{repository} did not take the model: {one_line(error)}") from error
    return str(address)
