"""The tool ``browse``: opens a web page or a PDF that the model names, and shows its text page by page.

It is called ``browse`` after the web browser of ARPO's deep search.  Others have a ``visit``, which takes
a goal and answers with a second model's summary; this one shows the text itself, so that an answer is a
function of the document, and the other name keeps a model that learned ``visit`` from expecting a summary.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from weakref import WeakValueDictionary

from system.config import ToolsConfig
from system.tools.browse.cache import DocumentCache
from system.tools.browse.document import MAX_FIND, WebDocument, shown_page, shown_passages
from system.tools.browse.fetching import Fetcher, FetchFailed
from system.tools.browse.reader import Reader, ReadFailed
from system.tools.browse.reading import Request
from system.tools.outcome import CallContext, ToolOutcome, ToolSpec, ToolStatus
from system.tools.tool import CallRefused, ToolUnavailable
from system.urls import Allowed, UrlRefused

KEPT_IN_MEMORY = 16  # documents
DIRECTORY = "pages"  # below the run's
_FRAGMENT = re.compile(r"(?:^|&)(page|find)=([^&]*)")


class BrowseTool:
    """Stateless: each call names its document; the text of one that was read is kept (:mod:`.cache`).

    Where a call has one argument (``<browse> URL </browse>``) the others are written behind the URL:
    ``https://host/path#page=2``, ``https://host/path#find=some words``.
    """

    spec = ToolSpec(
        name="browse",
        description=(
            "Open a web page or a PDF and read its text, page by page, or find words in it. A link is marked "
            "[L3], and its URL listed below. #page=2 or #find=words behind the URL asks for that page or for "
            "the passages around these words."
        ),
        parameters={
            "type": "object",
            "properties": {
                "url": {"type": "string", "description": "the address"},
                "page": {"type": "integer", "minimum": 1, "description": "which page of the text, from 1"},
                "find": {"type": "string", "description": "show only the passages around these words"},
            },
            "required": ["url"],
        },
        primary="url",
        pure=True,
    )

    def __init__(self, *, tools_config: ToolsConfig, run_directory: Path | None = None):
        """``tools_config``: of this tool, its own limits included; ``run_directory``: where documents are
        kept unless ``tools.browse_cache`` says where.  Raises ConfigError for bases that are none."""
        config = self._config = tools_config
        self._allowed = Allowed(config.browse_allow, config.browse_private)
        self._most = int(config.browse_mb * 1e6)
        self._fetcher = Fetcher(
            self._allowed,
            agent=config.browse_agent,
            most_bytes=self._most,
            rate_per_s=config.browse_rate_per_s,
            retries=config.retries,
        )
        self._reader = Reader()
        self._cache: DocumentCache | None = None
        directory = (
            Path(config.browse_cache) if config.browse_cache else run_directory and run_directory / DIRECTORY
        )
        if directory and config.browse_cache_mb:
            self._cache = DocumentCache(directory, int(config.browse_cache_mb * 1e6))
        self._recent: OrderedDict[str, WebDocument] = OrderedDict()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def run(self, arguments: Mapping[str, Any], context: CallContext) -> ToolOutcome:
        written, page, find = asked(arguments)
        until = time.monotonic() + (context.deadline_s or self._config.deadline_s)
        try:
            document = await self._document(written, until)
        except UrlRefused as error:
            raise CallRefused(str(error)) from error
        except FetchFailed as error:  # one host's trouble: the tool itself works
            status = ToolStatus.UNAVAILABLE if error.passing else ToolStatus.ERROR
            return ToolOutcome(status, f"The page could not be fetched: {error}.")
        except ReadFailed as error:
            return ToolOutcome(ToolStatus.ERROR, f"The document at {written} cannot be shown: {error}.")
        size = self._config.browse_page_chars
        try:
            show = partial(shown_passages, document, find) if find else partial(shown_page, document)
            return ToolOutcome(ToolStatus.OK, await asyncio.to_thread(show, page, size))  # it may be long
        except ValueError as error:
            return ToolOutcome(ToolStatus.REJECTED, f"{document.url}: {error}.")

    async def check(self) -> None:
        """Is anything allowed, can documents be kept, and does every host that is named answer?"""
        if not self._allowed.bases:
            raise ToolUnavailable("tools.browse_allow is empty, so nothing may be opened: name what may")
        if self._cache is not None:
            try:
                await asyncio.to_thread(self._cache.check)
            except OSError as error:
                remedy = (
                    "set tools.browse_cache to a directory that can be written, or tools.browse_cache_mb=0"
                )
                raise ToolUnavailable(
                    f"{self._cache.directory} cannot keep pages ({error}): {remedy}"
                ) from error

    async def close(self) -> None:
        await self._fetcher.close()

    async def _document(self, written: str, until: float) -> WebDocument:
        """The document at a URL that a model wrote, from where it is kept or from the web; calls for one
        document wait for each other.  Raises UrlRefused, FetchFailed and ReadFailed."""
        url = self._allowed.url(written)
        key = str(url)
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            if (recent := self._recent.get(key)) is not None:
                self._recent.move_to_end(key)
                return recent
            document = await self._kept(key)
            if document is None:
                found = await self._fetcher.fetch(url, until)
                request = Request(
                    url=found.url,
                    content_type=found.content_type,
                    charset=found.charset,
                    cut=found.cut,
                    pdf_pages=self._config.browse_pdf_pages,
                    allow=list(self._config.browse_allow),
                    private=list(self._config.browse_private),
                )
                document = await self._keep(key, await self._reader.read(request, found.data))
            self._recent[key] = document
            while len(self._recent) > KEPT_IN_MEMORY:
                self._recent.popitem(last=False)
            return document

    async def _kept(self, key: str) -> WebDocument | None:
        return await asyncio.to_thread(self._cache.get, self._file_key(key)) if self._cache else None

    async def _keep(self, key: str, document: WebDocument) -> WebDocument:
        return (
            await asyncio.to_thread(self._cache.put, self._file_key(key), document)
            if self._cache
            else document
        )

    def _file_key(self, key: str) -> str:
        """What the text depends on besides the address: another setting reads the document anew."""
        config = self._config
        return " ".join(
            [
                f"{self._most} {config.browse_pdf_pages}",
                *config.browse_allow,
                "|",
                *config.browse_private,
                key,
            ]
        )


def asked(arguments: Mapping[str, Any]) -> tuple[str, int, str]:
    """URL, page and words to find (arguments before the URL's fragment).  Raises CallRefused."""
    url, _, fragment = str(arguments["url"]).strip().strip("<>\"'").partition("#")
    behind = dict(_FRAGMENT.findall(fragment))
    page = arguments.get("page", behind.get("page", 1))
    find = str(arguments.get("find", unquote(behind.get("find", "")))).strip()
    if len(find) > MAX_FIND:
        raise CallRefused(f"find is longer than {MAX_FIND} characters: look for fewer words")
    if not str(page).isascii() or not str(page).isdigit() or not 0 < len(str(page)) < 9 or int(page) < 1:
        raise CallRefused(f"page={page!r} is no page number: pages count from 1")
    return url, int(page), find
