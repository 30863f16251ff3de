"""Who may ask the admin port: a bearer token, compared in constant time, and a Host header that is loopback's own.

The port listens on loopback, where any page that a browser shows can send requests: a name of the attacker's that
resolves to 127.0.0.1 makes them "same origin", replies readable. Such requests carry the attacker's name as Host.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import re
from typing import TYPE_CHECKING, Any

from agentopt.serving._types import Refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_HOST = re.compile(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
JSON_TYPE = b"application/json"


def loopback(host: str) -> bool:
    """Whether a host name means this machine and nothing else."""
    name = host.strip("[]").lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def check_token(values: list[bytes], token: str) -> None:
    """Compare the one Authorization header.

    Raises:
        Refusal: 401.
    """
    scheme, _, given = (values[0] if len(values) == 1 else b"").partition(b" ")
    right = hmac.compare_digest(given.strip(), token.encode())
    if scheme.lower() != b"bearer" or not right:
        raise Refusal(
            401,
            "The admin token is missing or wrong; it is in server.json of the run folder.",
            kind="authentication_error",
            code="invalid_admin_token",
        )


class HostCheck:
    """Answers 421 to requests that do not name this machine; around the whole app."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] == "http" and not _named_right(scope):
            await _refuse(send)
            return
        await self._app(scope, receive, send)


def _named_right(scope: Scope) -> bool:
    hosts = [value for name, value in scope["headers"] if name.lower() == b"host"]
    if len(hosts) != 1:
        return False
    named = _HOST.fullmatch(hosts[0].decode("latin-1"))
    return named is not None and loopback(named[1])


async def _refuse(send: Any) -> None:
    refusal = Refusal(421, "This port answers to localhost and 127.0.0.1 only.", code="wrong_host")
    body = json.dumps(refusal.body()).encode()
    headers = [(b"content-type", JSON_TYPE), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
