"""Who may come in: the secret in a request, wrong ones counted per address, and pages of other origins."""

from __future__ import annotations

import ipaddress
import math
from collections import OrderedDict
from collections.abc import Mapping

from agentopt.serving._types import COUNT, MESSAGES, Key, Keyring, Refusal
from agentopt.serving.gateway._limits import Limits

_ADDRESSES = 10_000


def secret_of(route: str, headers: Mapping[str, str]) -> str | None:
    """The secret a request carries: `Authorization: Bearer`, on the messages routes also `x-api-key`."""
    kind, _, secret = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and secret.strip():
        return secret.strip()
    if route in (MESSAGES, COUNT):
        return headers.get("x-api-key") or None
    return None


class Doors:
    """Checks keys; remembers, for at most 10,000 addresses, how many wrong ones came in the last minute."""

    def __init__(self, keyring: Keyring | None, limits: Limits) -> None:
        self._keyring = keyring
        self._allowed = limits.failures_per_minute
        self._wrong: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def key(self, route: str, headers: Mapping[str, str], client: str, now: float) -> Key | None:
        """The key of the one who asks; None where the server needs none.

        Raises:
            Refusal: 401; 429 after too many wrong keys from one address.
        """
        if self._keyring is None:
            return None
        secret = secret_of(route, headers)
        key = None if secret is None else self._keyring.find(secret)
        if key is not None:
            return key
        self._count(_neighbourhood(client), now)
        if secret is None:
            message = "no API key: send the header 'Authorization: Bearer <key>'"
        else:
            message = "the API key is not valid: it is unknown, was revoked or has expired"
        raise Refusal(401, message, kind="authentication_error", code="invalid_api_key")

    def _count(self, address: str, now: float) -> None:
        # A bucket that holds `_allowed` and refills in a minute: one pair of numbers an address.
        left, since = self._wrong.pop(address, (float(self._allowed), now))
        left = min(float(self._allowed), left + (now - since) * self._allowed / 60.0)
        if left < 1.0:
            self._wrong[address] = (left, now)
            raise Refusal(
                429,
                "too many requests without a valid key from this address; wait a minute",
                kind="rate_limit_error",
                code="too_many_failures",
                retry_after=math.ceil((1.0 - left) * 60.0 / self._allowed),
            )
        self._wrong[address] = (left - 1.0, now)
        if len(self._wrong) > _ADDRESSES:
            self._wrong.popitem(last=False)


def _neighbourhood(client: str) -> str:
    """An IPv4 address, or the /64 network of an IPv6 address: one customer has a whole one."""
    try:
        address = ipaddress.ip_address(client.partition("%")[0])
    except ValueError:
        return client
    if isinstance(address, ipaddress.IPv4Address):
        return client
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))


def check_host(host: str, server: str, limits: Limits) -> None:
    """For a server without keys: only its own names, so that no web page reaches it through a name of its own.

    Raises:
        Refusal: 403.
    """
    if "*" in limits.hosts or not _is_loopback(server):
        return
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    name = name.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost") or name in limits.hosts or _is_address(name):
        return
    raise Refusal(
        403,
        f"this server has no keys and answers to localhost only, not to {name[:80]!r}",
        kind="permission_error",
        code="unknown_host",
    )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(server: str) -> bool:
    try:
        return ipaddress.ip_address(server).is_loopback
    except ValueError:
        return False
