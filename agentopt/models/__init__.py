"""Language models: one contract (`LM`) over any provider, with cache, throttle, retries, prices and recording.

The unit is one call. `LM` adds everything around a `Client`; `lm(role)` finds the LM that plays a role here and now;
`connect(spec)` makes a client from a text. Importing this opens no socket and loads no provider library.
"""

from __future__ import annotations

from agentopt.models._background import run_sync
from agentopt.models._cache import CacheWarning
from agentopt.models._call import LMSettings, reply_watch, spend_guard
from agentopt.models._capture import Capture, capture_environment, capture_session, environment_outside
from agentopt.models._config import ModelsConfig, ModelSpec, as_lm, configure, current_config, lm, reset, resolve, use
from agentopt.models._connect import add_scheme, connect, openai_base_url
from agentopt.models._doubles import FunctionLM, ReplayLM, ScriptedLM
from agentopt.models._embedded import embedded_available, engine_info, time_engine
from agentopt.models._errors import (
    BudgetExhausted,
    LMBadReply,
    LMError,
    LMRateLimit,
    LMRefused,
    LMTimeout,
    LMUnavailable,
    UnknownModel,
)
from agentopt.models._knowledge import adapter_name, adapter_problem
from agentopt.models._litellm import LiteLLMClient
from agentopt.models._lm import LM
from agentopt.models._messages import image
from agentopt.models._openai import OpenAICompatible, OpenAIOptions
from agentopt.models._oracle import OracleLM
from agentopt.models._prices import Price, PriceTable, default_prices, load_prices
from agentopt.models._protocol import Client, LMOptions, Message, Reply, ReplyCache, Request, ToolCall
from agentopt.models._remote import RemoteClient, remote_models, roles_here, serve
from agentopt.models._retry import Clock, RetryPolicy
from agentopt.models._side_by_side import side_by_side
from agentopt.models._throttle import Throttle, ThrottleLimits, ThrottleTable

__all__ = [
    "LM",
    "BudgetExhausted",
    "CacheWarning",
    "Capture",
    "Client",
    "Clock",
    "FunctionLM",
    "LMBadReply",
    "LMError",
    "LMOptions",
    "LMRateLimit",
    "LMRefused",
    "LMSettings",
    "LMTimeout",
    "LMUnavailable",
    "LiteLLMClient",
    "Message",
    "ModelSpec",
    "ModelsConfig",
    "OpenAICompatible",
    "OpenAIOptions",
    "OracleLM",
    "Price",
    "PriceTable",
    "RemoteClient",
    "ReplayLM",
    "Reply",
    "ReplyCache",
    "Request",
    "RetryPolicy",
    "ScriptedLM",
    "Throttle",
    "ThrottleLimits",
    "ThrottleTable",
    "ToolCall",
    "UnknownModel",
    "adapter_name",
    "adapter_problem",
    "add_scheme",
    "as_lm",
    "capture_environment",
    "capture_session",
    "configure",
    "connect",
    "current_config",
    "default_prices",
    "embedded_available",
    "engine_info",
    "environment_outside",
    "image",
    "lm",
    "load_prices",
    "openai_base_url",
    "remote_models",
    "reply_watch",
    "reset",
    "resolve",
    "roles_here",
    "run_sync",
    "serve",
    "side_by_side",
    "spend_guard",
    "time_engine",
    "use",
]
