"""URLs that a model wrote: which may be opened, and at which addresses (``tools.browse_allow``)."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from yarl import URL

from system.errors import ConfigError, EspalierError

MAX_URL = 2000  # characters
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_SCHEMES = ("http", "https")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class UrlRefused(EspalierError, ValueError):
    """A URL that may not be opened; the message is for the model."""


@dataclass(frozen=True, slots=True)
class Base:
    """``https://host/path/``: URLs of this scheme, host and port, below the path.

    ``host`` "" stands for every host (``https://``), one that begins with "." for all hosts below it
    (``https://*.wikipedia.org/``).
    """

    scheme: str
    host: str
    port: int
    path: str  # ends with "/", or is the path itself

    def covers(self, url: URL) -> bool:
        if url.scheme != self.scheme or url.port != self.port:
            return False
        host = url.raw_host or ""
        if self.host and not (host.endswith(self.host) if self.host.startswith(".") else host == self.host):
            return False
        path, below = url.raw_path, self.path if self.path.endswith("/") else f"{self.path}/"
        return path == self.path or path.startswith(below)

    @property
    def url(self) -> str:
        """Where a host that is named can be asked whether it is there; "" for none in particular."""
        named = self.host and not self.host.startswith(".")
        return str(URL.build(scheme=self.scheme, host=self.host, port=self.port)) if named else ""


class Allowed:
    """The bases and private networks that a run's user allows.  Raises ConfigError naming the setting."""

    def __init__(self, bases: Sequence[str], private: Sequence[str] = ()):
        self.texts = tuple(bases)
        self.bases = tuple(_base(number, text) for number, text in enumerate(bases))
        self._private = tuple(_network(number, text) for number, text in enumerate(private))

    def url(self, text: str) -> URL:
        """``text`` as a URL that may be opened, without its fragment.  Raises :class:`UrlRefused`."""
        url = _parsed(text)
        if not any(base.covers(url) for base in self.bases):
            known = ", ".join(self.texts) or "none"
            raise UrlRefused(f"{text!r} is not below an allowed address; allowed: {known}")
        if (literal := _literal(url.raw_host or "")) is not None and not self.address(str(literal), literal):
            raise UrlRefused(f"{text!r} is at a private address")
        return url

    def address(self, host: str, address: Address) -> bool:
        """Whether ``host`` may be reached at ``address``: a public one, or one that the user named."""
        reached = _embedded(address) or address
        if reached.is_global and not reached.is_multicast:
            return True
        if any(reached in network for network in self._private):
            return True
        named = any(base.host == host for base in self.bases)
        return named and (_literal(host) is not None or (host == "localhost" and address.is_loopback))


def _parsed(text: str) -> URL:
    """Raises :class:`UrlRefused` for what is no plain web address."""
    if len(text) > MAX_URL:
        raise UrlRefused(f"the URL is longer than {MAX_URL} characters")
    if not text.isprintable() or any(char.isspace() for char in text):
        raise UrlRefused(f"not a URL: {text!r} has white space or control characters in it")
    try:
        url = URL(text).with_fragment(None)
        port = url.port
    except ValueError as error:
        raise UrlRefused(f"not a URL: {text!r}: {error}") from error
    if url.scheme not in _SCHEMES or not url.raw_host or not port:
        raise UrlRefused(f"not a web address: {text!r}; it begins with http:// or https://")
    if url.user is not None or url.password is not None:
        raise UrlRefused("a URL with a user name or a password in it is not opened")
    path = unquote(unquote(url.raw_path)).replace("\\", "/")  # as a careless server may read it
    if ".." in path.split("/"):
        raise UrlRefused(f"{text!r} leaves its own path by '..'")
    return url


def _base(number: int, text: str) -> Base:
    where = f"tools.browse_allow[{number}]={text!r}"
    if text in ("http://", "https://"):
        return Base(text.removesuffix("://"), "", 80 if text == "http://" else 443, "/")
    scheme, _, rest = text.partition("://")
    wild = rest.startswith("*.")
    try:
        url = _parsed(f"{scheme}://{rest.removeprefix('*.')}")
    except UrlRefused as error:
        raise ConfigError(f"{where}: {error}; write it as https://host/path/, or https://*.host/") from error
    if url.raw_query_string:
        raise ConfigError(f"{where}: a base has no query: take {'?' + url.raw_query_string!r} out")
    host = url.raw_host or ""
    return Base(url.scheme, f".{host}" if wild else host, url.port or 0, url.raw_path)


def _network(number: int, text: str) -> Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise ConfigError(
            f"tools.browse_private[{number}]={text!r}: {error}; write it as 10.1.2.3 or 10.0.0.0/8"
        ) from error


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _embedded(address: Address) -> Address | None:
    """The IPv4 address that an IPv6 one leads to, where it does."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour
