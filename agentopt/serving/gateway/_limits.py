"""Every bound of the gateway in one place: sizes in bytes, times in seconds, counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one client, and all of them together, may take. The defaults suit one machine with one engine."""

    head_bytes: int = 32 << 10
    """Request line and headers."""
    head_fields: int = 100
    """Header lines."""
    head_seconds: float = 10.0
    """From the first byte of a request (or the connection) to the end of its headers."""
    keep_alive_seconds: float = 75.0
    """An idle connection is kept so long."""
    body_bytes: int = 8 << 20
    body_seconds: float = 30.0
    """From the end of the headers to the end of the body."""
    bodies_bytes: int = 512 << 20
    """Bodies of all requests in flight together, with what they take once they are read as JSON."""
    nesting: int = 64
    """Depth of arrays and objects in a body."""
    replies: int = 128
    """Of one request: `n` times its prompts."""
    inputs: int = 2048
    """Texts of one request for embeddings."""
    logprobs: int = 100
    """Alternatives of each token."""
    schema_values: int = 10_000
    """Values in all schemas, tools and choices of one request."""
    alternatives: int = 1000
    """Of these, in lists of which one is to be chosen."""
    fields: frozenset[str] = frozenset()
    """Of `_fields.REFUSED`, those that clients may set all the same."""
    first_seconds: float = 600.0
    """From the forwarded request to the first byte of the engine's reply body."""
    idle_seconds: float = 120.0
    """Between two pieces of the engine's reply."""
    total_seconds: float = 1800.0
    """One request, whatever happens."""
    connect_seconds: float = 10.0
    """To open a connection to the engine."""
    stalled_seconds: float = 120.0
    """A client that reads nothing of its reply is cut off."""
    connections: int = 4096
    """Of clients, open at a time."""
    in_flight: int = 1024
    """Requests forwarded or waiting, at a time; more get 503."""
    whole_bytes: int = 1 << 20
    """A reply that is not streamed is held back up to this size: an engine that breaks off leaves a proper error."""
    kept_bytes: int = 4 << 20
    """A reply that is longer is not handed to observers that want it."""
    event_bytes: int = 1 << 20
    """An unfinished server-sent event is held back up to this size."""
    failures_per_minute: int = 20
    """Wrong keys from one address; more get 429, a valid key always passes."""
    grace_seconds: float = 5.0
    """What is still under way when the server is told to stop gets so long before it is cut."""
    cors: tuple[str, ...] = ()
    """Origins whose pages may call the endpoint from a browser; "*" for all. Empty: none."""
    hosts: tuple[str, ...] = ()
    """Names besides localhost and addresses that a keyless server on loopback answers to; "*" for all.

    Without this a web page could reach it by pointing its own name at 127.0.0.1 (DNS rebinding).
    """
