"""The OpenAPI document of the public routes: what this server has with its engine, nothing of the engine's own."""

from __future__ import annotations

from typing import Any

from agentopt.serving._types import CHAT, COMPLETIONS, COUNT, EMBEDDINGS, MESSAGES, RESPONSES, Abilities

_TEXT_OR_LIST: dict[str, Any] = {"oneOf": [{"type": "string"}, {"type": "array", "items": {}}]}
_MESSAGES: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {"role": {"type": "string"}, "content": {}},
    },
}
_COUNT: dict[str, Any] = {"type": ["integer", "null"]}
_COMMON: dict[str, Any] = {
    "model": {
        "type": ["string", "null"],
        "maxLength": 256,
        "description": "A name of GET /v1/models: base, adapter or virtual model. Without it: the base model.",
    },
    "temperature": {"type": ["number", "null"]},
    "top_p": {"type": ["number", "null"]},
    "user": {"type": ["string", "null"]},
}
_STREAM = {"stream": {"type": ["boolean", "null"], "description": "Reply as server-sent events."}}

_BODIES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    CHAT: (
        "Answer a conversation",
        ["messages"],
        {"messages": _MESSAGES, "max_tokens": _COUNT, "max_completion_tokens": _COUNT, **_COMMON, **_STREAM},
    ),
    COMPLETIONS: ("Continue a text", ["prompt"], {"prompt": _TEXT_OR_LIST, "max_tokens": _COUNT, **_COMMON, **_STREAM}),
    EMBEDDINGS: ("Embed texts", ["input"], {"input": _TEXT_OR_LIST, "model": _COMMON["model"]}),
    RESPONSES: (
        "Answer, in the form of the Responses API",
        ["input"],
        {"input": _TEXT_OR_LIST, "max_output_tokens": _COUNT, **_COMMON, **_STREAM},
    ),
    MESSAGES: (
        "Answer, in the form of the Messages API",
        ["messages"],
        {"messages": _MESSAGES, "max_tokens": _COUNT, **_COMMON, **_STREAM},
    ),
    COUNT: ("Count the tokens of a conversation", ["messages"], {"messages": _MESSAGES, "model": _COMMON["model"]}),
}

_ERRORS = {
    "400": "The request is malformed, or the engine cannot take it.",
    "401": "No valid key.",
    "403": "The key may not do this.",
    "404": "There is no such model or thing.",
    "405": "Another method is needed: see Allow.",
    "408": "The body did not come in time.",
    "413": "The body is too long.",
    "415": "The body must be application/json.",
    "422": "The engine cannot take the request.",
    "429": "Too many requests or tokens: see Retry-After.",
    "431": "The headers are too long.",
    "501": "The engine does not have this route.",
    "502": "The engine broke off.",
    "503": "The engine is starting or busy, or the server is shutting down: see Retry-After.",
    "504": "The engine was silent, or the request took too long.",
}


def document(abilities: Abilities, feedback: bool, *, server: str = "/", keys: bool = True) -> dict[str, Any]:
    """OpenAPI 3.1.

    Args:
        abilities: What the engine has: routes it lacks are not in the document.
        feedback: Whether POST /v1/feedback is there (capture is on).
        server: The base URL.
        keys: Whether the server asks for keys.
    """
    paths: dict[str, Any] = {
        "/health": {"get": _state("The process is up", {"200": "It is."})},
        "/ready": {"get": _state("Requests are taken", {"200": "They are.", "503": "Not now."})},
        "/v1/models": {"get": _read("The models that can be asked", "ModelList", [])},
        "/v1/models/{model}": {"get": _read("One model", "Model", [_MODEL_NAME])},
    }
    for route in sorted(abilities.routes & _BODIES.keys()):
        paths[route] = {"post": _forwarded(route)}
    if feedback:
        paths["/v1/feedback"] = {"post": _feedback()}
    whole: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "agentopt serve", "version": "1"},
        "servers": [{"url": server}],
        "paths": paths,
        "components": {"schemas": _SCHEMAS},
    }
    if keys:
        whole["security"] = [{"bearer": []}]
        whole["components"] = {"securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}, "schemas": _SCHEMAS}
    return whole


_MODEL_NAME = {
    "name": "model",
    "in": "path",
    "required": True,
    "description": 'May hold "/" and ":".',
    "schema": {"type": "string", "minLength": 1},
}


def _schema(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _failures(*codes: str) -> dict[str, Any]:
    return {code: {"description": _ERRORS[code], "content": _schema("Error")} for code in codes}


def _state(summary: str, codes: dict[str, str]) -> dict[str, Any]:
    replies = {code: {"description": text, "content": _schema("State")} for code, text in codes.items()}
    return {"summary": summary, "security": [], "responses": replies | _failures("405")}


def _read(summary: str, name: str, parameters: list[dict[str, Any]]) -> dict[str, Any]:
    replies: dict[str, Any] = {"200": {"description": "Found.", "content": _schema(name)}}
    codes = ("400", "401", "403", "404", "405", "429", "431")
    return {"summary": summary, "parameters": parameters, "responses": replies | _failures(*codes)}


def _forwarded(route: str) -> dict[str, Any]:
    summary, required, properties = _BODIES[route]
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if "stream" in properties:
        content["text/event-stream"] = {}
    body = {"type": "object", "required": required, "properties": properties, "additionalProperties": True}
    replies: dict[str, Any] = {"200": {"description": "The engine's reply, unchanged.", "content": content}}
    for code, text in _ERRORS.items():
        name = "MessagesError" if route in (MESSAGES, COUNT) else "Error"
        replies[code] = {"description": text, "content": _schema(name)}
    return {
        "summary": summary,
        "parameters": [_SESSION],
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": replies,
    }


_SESSION = {
    "name": "X-Agentopt-Session",
    "in": "header",
    "required": False,
    "description": "Groups the requests of one run of an agent: one captured trace, one variant of a virtual model.",
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
}


def _feedback() -> dict[str, Any]:
    body = {
        "type": "object",
        "required": ["request_id"],
        "properties": {
            "request_id": {"type": "string", "description": "The reply's X-Request-Id."},
            "score": {"oneOf": [{"type": "number", "minimum": -1, "maximum": 1}, {"enum": ["up", "down"]}]},
            "text": {"type": "string"},
            "expected": {"type": "string", "description": "What the reply should have been."},
        },
        "anyOf": [{"required": ["score"]}, {"required": ["text"]}, {"required": ["expected"]}],
    }
    codes = ("400", "401", "403", "404", "405", "408", "413", "415", "429", "431", "503")
    replies: dict[str, Any] = {
        "200": {"description": "Stored.", "content": {"application/json": {"schema": {"type": "object"}}}}
    }
    return {
        "summary": "Say how good a reply was",
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": replies | _failures(*codes),
    }


_SCHEMAS: dict[str, Any] = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    },
    "MessagesError": {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
    "State": {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}},
    "Model": {
        "type": "object",
        "required": ["id", "object"],
        "properties": {"id": {"type": "string"}, "object": {"const": "model"}, "parent": {"type": ["string", "null"]}},
    },
    "ModelList": {
        "type": "object",
        "required": ["object", "data"],
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
        },
    },
}
