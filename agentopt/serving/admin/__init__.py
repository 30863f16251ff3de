"""The admin side of the endpoint: what runs, and what may be changed while it runs. Importing this loads no server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agentopt.serving.admin._client import AdminClient
from agentopt.serving.admin._control import Control, checked_token

if TYPE_CHECKING:
    from agentopt.serving.admin._app import admin_app as admin_app

__all__ = ["AdminClient", "Control", "admin_app", "checked_token"]


def __getattr__(name: str) -> Any:
    if name == "admin_app":
        from agentopt.serving.admin._app import admin_app

        return admin_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
