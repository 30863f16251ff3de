"""From a model spec to a client; nothing is imported, loaded or contacted before the first call."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from typing import Any

from agentopt.errors import UserError
from agentopt.models._errors import UnknownModel
from agentopt.models._litellm import LiteLLMClient, litellm_installed
from agentopt.models._openai import OPENAI_URL, OpenAICompatible, OpenAIOptions
from agentopt.models._prices import default_prices
from agentopt.models._protocol import Client

DEFAULT_EMBEDDED = "embedded/smollm2-135m-instruct"

UPSTREAM_ENV = "AGENTOPT_UPSTREAM_BASE_URL"
"""While the capture endpoint stands in OPENAI_BASE_URL, the address (maybe empty) that stood there before."""

_FORMS = (
    "provider/model (openai/gpt-4o-mini, anthropic/claude-haiku-4-5, ...), openai-compatible:URL#model, "
    f"{DEFAULT_EMBEDDED}, a path to a .gguf file, or hf:owner/repo/file.gguf"
)

_PROVIDERS = """
    ai21 aiml anthropic azure azure_ai baseten bedrock cerebras cloudflare codestral cohere cohere_chat dashscope
    databricks deepinfra deepseek featherless_ai fireworks_ai friendliai gemini github github_copilot gigachat groq
    hosted_vllm huggingface hyperbolic inception lambda_ai lemonade litellm_proxy llamafile lm_studio meta_llama minimax
    mistral moonshot morph nebius novita nscale nvidia_nim oci ollama ollama_chat openai openrouter ovhcloud perplexity
    replicate sagemaker sagemaker_chat sambanova scaleway snowflake together_ai vercel_ai_gateway vertex_ai vllm
    volcengine voyage wandb watsonx xai xinference zai
"""
PROVIDERS = frozenset(_PROVIDERS.split())
"""Provider prefixes of litellm (from its provider list, 1.106); others work as `litellm:provider/model`."""


_schemes: dict[str, tuple[Callable[[str], Client], str]] = {}


def add_scheme(name: str, make: Callable[[str], Client], form: str) -> None:
    """Let a room above make the clients of specs `NAME:...`; `make` gets the whole spec, `form` is for messages."""
    _schemes[name] = (make, form)


def _expected() -> str:
    return ", ".join([_FORMS, *(form for _, form in _schemes.values())])


def is_client(value: Any) -> bool:
    """Whether `value` can serve as a client already."""
    return isinstance(value, Client)


def connect(spec: str | Client, *, base_url: str | None = None, api_key: str | None = None) -> Client:
    """The client for a model spec; a client passes through.

    Forms: `embedded/NAME`, `FILE.gguf`, `hf:owner/repo/file.gguf` · `openai-compatible:URL#model` (or any name with
    `base_url=`) · `openai/MODEL` (direct; OPENAI_BASE_URL and OPENAI_API_KEY are obeyed) · any other litellm
    `provider/model` · `litellm:...` forces litellm · `fold:META` and other schemes that were added.

    Raises:
        UnknownModel: the spec has none of these forms, or needs something that is not installed.
    """
    if not isinstance(spec, str):
        if is_client(spec):
            return spec
        raise UserError(f"model: expected a spec such as 'openai/gpt-4o-mini' or a client, found {type(spec).__name__}")
    spec = spec.strip()
    if not spec:
        raise UnknownModel(f"model: the spec is empty; expected {_expected()}")
    scheme = _schemes.get(spec.partition(":")[0]) if ":" in spec else None
    if scheme is not None:
        return scheme[0](spec)
    if base_url is not None:
        return OpenAICompatible(base_url, spec.removeprefix("openai/"), OpenAIOptions(api_key=api_key))
    if spec.startswith("openai-compatible:"):
        return _compatible(spec, api_key)
    if _is_embedded(spec):
        from agentopt.models._embedded import EmbeddedClient

        return EmbeddedClient(spec)
    if spec.startswith("litellm:"):
        return _litellm(spec.removeprefix("litellm:"), api_key)
    return _provider(spec, api_key)


def _is_embedded(spec: str) -> bool:
    return spec.startswith(("embedded/", "hf:")) or spec.endswith(".gguf")


def _compatible(spec: str, api_key: str | None) -> Client:
    url, mark, model = spec.removeprefix("openai-compatible:").partition("#")
    if not mark or not model or not url:
        example = "openai-compatible:http://localhost:8000/v1#my-model"
        raise UnknownModel(f"model {spec!r}: expected openai-compatible:URL#model, for example {example}")
    return OpenAICompatible(url, model, OpenAIOptions(api_key=api_key))


def _provider(spec: str, api_key: str | None) -> Client:
    provider, slash, model = spec.partition("/")
    if not slash:
        known = [name for name in default_prices().prices if name.partition("/")[2] == spec]
        near = known or _near(spec)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UnknownModel(f"model {spec!r} names no provider; {hint}Expected {_expected()}")
    if provider == "openai" and model:
        return _openai(model, api_key)
    if provider not in PROVIDERS or not model:
        near = difflib.get_close_matches(provider, PROVIDERS, n=1)
        hint = f"did you mean {near[0] + '/' + model!r}? " if near and model else ""
        raise UnknownModel(
            f"model {spec!r}: no provider is called {provider!r}; {hint}Expected {_expected()}; "
            "litellm:provider/model for a provider that only a newer litellm knows"
        )
    return _litellm(spec, api_key)


def _near(spec: str) -> list[str]:
    names = {name.partition("/")[2]: name for name in default_prices().prices}
    return [names[found] for found in difflib.get_close_matches(spec, names, n=1)]


def openai_base_url() -> str:
    """Where `openai/...` goes: OPENAI_BASE_URL as the user set it (not the capture endpoint), else api.openai.com."""
    given = os.environ.get(UPSTREAM_ENV)
    if given is None:
        given = os.environ.get("OPENAI_BASE_URL")
    return given or OPENAI_URL


def _openai(model: str, api_key: str | None) -> Client:
    url = openai_base_url()
    official = url.rstrip("/") == OPENAI_URL
    key = api_key or os.environ.get("OPENAI_API_KEY")
    if official and not key:
        raise UnknownModel(
            f"model 'openai/{model}' needs an API key; set OPENAI_API_KEY (or OPENAI_BASE_URL for a server of your own)"
        )
    reasoning = model.startswith(("o1", "o3", "o4", "gpt-5", "gpt-6"))
    options = OpenAIOptions(
        api_key=key,
        choices="schema" if official else "text",
        max_tokens_name="max_completion_tokens" if official and reasoning else "max_tokens",
        name=f"openai/{model}" if official else None,
    )
    return OpenAICompatible(url, model, options)


def _litellm(model: str, api_key: str | None) -> Client:
    if not litellm_installed():
        raise UnknownModel(f"model {model!r} needs the litellm extra; run: pip install 'agentopt[litellm]'")
    base_url = openai_base_url() if model.startswith("openai/") else None
    return LiteLLMClient(model, base_url=None if base_url == OPENAI_URL else base_url, api_key=api_key)
