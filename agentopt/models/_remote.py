"""A language model that lives in another process: requests, replies and errors as JSON, and the client that asks.

Unit: one request. The process that owns the models serves it through cache, spend guard, throttle and retries
(`serve`); the process that runs the program holds a `RemoteClient` per role and keeps no cache and no retries of its
own. So every paid call of many processes passes one gate: the budget is exact and no reply is paid for twice.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from agentopt.errors import RunError, UserError
from agentopt.graph import Usage
from agentopt.models import _config, _errors
from agentopt.models._call import Call, LMSettings
from agentopt.models._config import ModelsConfig, resolve
from agentopt.models._errors import BudgetExhausted, LMError, UnknownModel
from agentopt.models._knowledge import adapter_version, check_adapter
from agentopt.models._lm import LM
from agentopt.models._messages import Prompt
from agentopt.models._protocol import LMOptions, Reply, Request
from agentopt.models._retry import RetryPolicy
from agentopt.models._throttle import ThrottleLimits, ThrottleTable

Forward = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
"""Takes a question (`{"role", "request"}`) to the process that owns the models and brings its answer."""

_UNLIMITED = ThrottleLimits(start=1_000_000, minimum=1_000_000, maximum=1_000_000)


def request_to_dict(request: Request) -> dict[str, Any]:
    """A JSON value; unlike `Request.to_dict` with the timeout."""
    data = request.to_dict()
    data["options"]["timeout"] = request.options.timeout
    return data


def request_from_dict(data: Mapping[str, Any]) -> Request:
    """The inverse of `request_to_dict`."""
    return Request(
        model=data["model"],
        messages=tuple(data["messages"]),
        tools=tuple(data["tools"]),
        schema=data["schema"],
        choices=None if data["choices"] is None else tuple(data["choices"]),
        options=options_from_dict(data["options"]),
        adapter=data.get("adapter"),
        adapter_version=adapter_version(data.get("adapter")),  # the folder may be out of reach for who asks
    )


def options_to_dict(options: LMOptions) -> dict[str, Any]:
    """A JSON value with the timeout."""
    return {**options.to_dict(), "timeout": options.timeout}


def options_from_dict(data: Mapping[str, Any]) -> LMOptions:
    """The inverse of `options_to_dict`."""
    values: dict[str, Any] = {**data, "stop": tuple(data["stop"])}
    return LMOptions(**values)


# ---- the process that owns the models


def roles_here(*, default_agent: bool = True) -> dict[str, dict[str, Any]]:
    """What another process must know of the models configured here: role → name, determinism, sampling options.

    Args:
        default_agent: also describe who plays "agent" when nothing is configured.

    Raises:
        UnknownModel: a configured spec names no reachable model.
    """
    names = {name for config in (_config.current_config(), _config._process) for name in config.models}
    found: dict[str, dict[str, Any]] = {}
    for role in sorted(names | ({"agent"} if default_agent else set[str]())):
        try:
            lm = resolve(role)
        except UnknownModel:
            raise
        except UserError:
            continue  # no model at all: a program that asks for one gets that error where it runs
        found[role] = {
            "name": lm.name,
            "deterministic": lm.deterministic,
            "options": options_to_dict(lm.settings.options),
        }
    return found


async def serve(question: Mapping[str, Any]) -> dict[str, Any]:
    """Answer a forwarded question with the models, cache, guard and meters of this context; never raises."""
    try:
        lm = resolve(str(question["role"]))
        request = request_from_dict(question["request"])
        check_adapter(lm.client, request.adapter)
        call = Call(request, Prompt(request.messages, {}), None)
        reply = await lm._reply(call, request)
        return {"reply": _reply_to_dict(replace(reply, usage=call.usage, cost=call.cost))}
    except LMError as error:
        data = {"type": type(error).__name__, "text": str(error), "status": error.status, "retryable": error.retryable}
        return {"lm_error": data}
    except BudgetExhausted as error:
        return {"budget": str(error)}
    except UserError as error:
        return {"bad_input": str(error), "unknown_model": isinstance(error, UnknownModel)}
    except Exception as error:  # noqa: BLE001  (a defect here must reach the caller, not leave it waiting)
        return {"failed": f"{type(error).__name__}: {error}"}


def _reply_to_dict(reply: Reply) -> dict[str, Any]:
    saved = None if reply.saved_usage is None else reply.saved_usage.to_dict()
    return {**reply.to_dict(), "cached": reply.cached, "saved_usage": saved, "saved_cost": reply.saved_cost}


# ---- the process that runs the program


@dataclass
class RemoteClient:
    """A `Client` whose model is elsewhere. The owner's name for it is kept, so requests have the same keys there."""

    name: str
    deterministic: bool
    role: str
    forward: Forward
    cacheable: bool = False
    """The owner has the cache."""
    own_timeout: bool = True
    """The owner counts the timeout from when its throttle lets the call through."""

    async def send(self, request: Request) -> Reply:
        """The owner's reply.

        Raises:
            LMError, BudgetExhausted, UserError: as the owner's own call.
        """
        answer = await self.forward({"role": self.role, "request": request_to_dict(request)})
        return _read(answer)

    async def stream(self, request: Request) -> AsyncIterator[str | Reply]:
        """The reply in one piece."""
        reply = await self.send(request)
        yield reply.text
        yield reply

    def adapter_problem(self, adapter: str) -> str | None:
        """None: the owner says it when it is asked."""
        return None

    async def aclose(self) -> None:
        """Nothing to close: the connection belongs to whoever made `forward`."""


def remote_models(roles: Mapping[str, Mapping[str, Any]], forward: Forward) -> ModelsConfig:
    """The models that `roles_here` described in their owner's process, reached through `forward`."""
    free, never = ThrottleTable(_UNLIMITED), RetryPolicy(max_tries=1, max_wait=0.0)  # the owner does both
    models: dict[str, LM] = {}
    for role, known in roles.items():
        client = RemoteClient(str(known["name"]), bool(known["deterministic"]), role, forward)
        settings = LMSettings(options=options_from_dict(known["options"]), throttle=free, retry=never)
        models[role] = LM(client, role=role, settings=settings)
    return ModelsConfig(models, LMSettings(throttle=free))


def _read(answer: Mapping[str, Any]) -> Reply:
    if "reply" in answer:
        data: Mapping[str, Any] = answer["reply"]
        saved = data["saved_usage"]
        return replace(
            Reply.from_dict(data),
            cached=bool(data["cached"]),
            saved_usage=None if saved is None else Usage.from_dict(saved),
            saved_cost=data["saved_cost"],
        )
    if "lm_error" in answer:
        data = answer["lm_error"]
        kind = getattr(_errors, str(data["type"]), LMError)
        error: LMError = kind(str(data["text"]), status=data["status"], retryable=data["retryable"])
        raise error
    if "budget" in answer:
        raise BudgetExhausted(str(answer["budget"]))
    if "bad_input" in answer:
        raise (UnknownModel if answer["unknown_model"] else UserError)(str(answer["bad_input"]))
    raise RunError(f"the process that owns the models failed: {answer.get('failed', 'no answer')}")
