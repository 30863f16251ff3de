"""Whatever the OpenAPI document allows or forbids, no answer is a server's mistake or breaks the document."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentopt.serving._types import Key
from agentopt.serving.gateway import document
from tests.serving.endpoint import Endpoint, only_forwarded, run

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,missing_required_header,unsupported_method,allow_header_conformance"
)


class Sink:
    """Takes any feedback."""

    async def give(self, body: Mapping[str, Any], key: Key | None) -> dict[str, Any]:
        """An answer of the documented form."""
        return {"object": "feedback", "id": "fb_1", "request_id": str(body.get("request_id", ""))}


def test_no_request_of_the_document_ends_in_a_server_error(tmp_path: Path) -> None:
    async def test(at: Endpoint) -> None:
        path = tmp_path / "openapi.json"
        path.write_text(json.dumps(document(at.engine.abilities, feedback=True)), encoding="utf-8")
        argv = [
            *("-m", "schemathesis.cli", "run", str(path), "--url", f"http://127.0.0.1:{at.port}"),
            *("--header", f"Authorization: Bearer {at.secret}", "--checks", CHECKS, "--phases", "coverage,fuzzing"),
            *("--seed", "1", "--max-examples", "10", "--generation-database", "none", "--warnings", "off"),
            *("--no-color", "--request-timeout", "60"),
        ]
        child = await asyncio.create_subprocess_exec(
            sys.executable, *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=tmp_path
        )
        said, _ = await child.communicate()
        assert child.returncode == 0, said.decode()[-6000:]
        assert only_forwarded(at.asked)
        assert len(at.asked) > 50
        statuses = [line["status"] for line in at.log()]
        assert max(statuses) < 500
        assert {200, 400, 404, 405} <= set(statuses)

    run(tmp_path, test, feedback=Sink())
