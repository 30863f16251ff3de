"""`python -m agentopt.serving.engines.prepare_worker`: does one job of `prepare`, told as JSON on stdin.

It says on stdout how far it is (lines that begin with "@prepare "), and ends at once when stdin does: then the server
that asked for the work is gone.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from agentopt.errors import AgentoptError, RunError, UserError
from agentopt.serving.adapters._prepared import Marks, marks

_MARK = "@prepare "


def say(**told: Any) -> None:
    """One line for the server."""
    sys.stdout.write(f"{_MARK}{json.dumps(told)}\n")
    sys.stdout.flush()


def work(job: dict[str, Any]) -> str:
    """Do it; gives the path of what was made.

    Raises:
        AgentoptError: it cannot be done.
    """
    if job["job"] == "fetch":
        return _fetch(job["source"])
    out = Path(job["out"])
    out.parent.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        if not (out / "config.json").is_file():
            _JOBS[job["job"]](job, out)
    return str(out)


@contextmanager
def _alone(out: Path) -> Generator[None]:
    """Wait for another server that makes the same folder; the kernel frees the lock of one that was killed."""
    with out.with_name(f"{out.name}.lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(what="waiting for another server that prepares the same model")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _convert(job: dict[str, Any], out: Path) -> None:
    """A GGUF file into a folder of safetensors."""
    from agentopt.weights import load

    partial, files = _fresh(out), marks(job["source"])
    say(what="reading the GGUF file")
    model, tokenizer = load.model(job["source"], dtype=job["dtype"], device="cpu")
    say(what="writing the model folder")
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    except load.need("safetensors").SafetensorError as error:
        raise RunError(f"{partial}: cannot be written ({error}); make room.") from error
    about = {"source": job["model"], "sha256": job["digest"], "dtype": job["dtype"]}
    (partial / "prepared.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, out)
    # A fold loads the file as float32: of a model that was loaded otherwise those hashes cannot be told.
    _write_hashes(job, out, files, model if job["dtype"] == "float32" else None)


def _quantize(job: dict[str, Any], out: Path) -> None:
    """Any model into a folder of a byte per weight; the work of a process that was killed is gone on with."""
    from agentopt.weights import gg
    from agentopt.weights.gg._source import opened

    options = gg.QuantizeOptions(dynamic_activations=job["cpu"])  # of stock formats, vLLM on a CPU knows only these
    say(what="reading the model")
    files = marks(job["source"])
    with opened(job["source"]) as source:
        try:
            gg.quantize(source, out, job["format"], options=options, on_event=_tell)
        except UserError:
            left = out.with_name(f"{out.name}.partial")
            if not left.exists():
                raise
            shutil.rmtree(left)  # begun with other files of the same content, or with older settings
            gg.quantize(source, out, job["format"], options=options, on_event=_tell)
        _write_hashes(job, out, files, source)


def _unpack(job: dict[str, Any], out: Path) -> None:
    """A .ggz archive into a folder."""
    from agentopt.weights.gg import archive

    shutil.rmtree(out.with_name(f"{out.name}.partial"), ignore_errors=True)
    files = marks(job["source"])
    unpack: Any = archive.unpack
    unpack(job["source"], out, on_event=_tell)
    _write_hashes(job, out, files, None)


def _write_hashes(job: dict[str, Any], out: Path, files: Marks, made_from: Any) -> None:
    """What folded adapters call this base, while all is at hand; what fails here is done when it is first needed."""
    from agentopt.serving.adapters.base_hash import record_prepared

    say(what="hashing the weights, for adapters")
    with suppress(AgentoptError, OSError, MemoryError, ValueError, RuntimeError, KeyError):
        record_prepared(out, job["model"], files, made_from)


def _fetch(name: str) -> str:
    """A hub model into the hub's own cache."""
    import importlib

    from agentopt.models._hub import check_on_hub

    hub: Any = importlib.import_module("huggingface_hub")
    cached = check_on_hub(name)
    say(what=f"fetching {name} from the hub")
    wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
    try:
        found = hub.snapshot_download(name, allow_patterns=wanted, local_files_only=cached)
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model {name!r}: the Hugging Face hub does not give it: {first}") from error
    return str(found)


_JOBS = {"convert": _convert, "quantize": _quantize, "unpack": _unpack}


def _fresh(out: Path) -> Path:
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


def _tell(event: Any) -> None:
    """How far a quantization is."""
    kind = event.kind
    if kind == "working":
        say(what=f"quantizing {event.what}" if event.total else event.what, done=event.done, total=event.total)
    elif kind == "resumed":
        say(what=f"going on after {event.step} layers of an earlier start")
    elif kind == "warned":
        say(what=event.message)


def _until_alone() -> None:
    """Ends the process when stdin ends."""
    while os.read(0, 1 << 12):
        pass
    os._exit(3)


def main() -> None:
    """Read the job, do it, say what came of it."""
    job = json.loads(_line())
    threading.Thread(target=_until_alone, daemon=True).start()
    try:
        say(result=work(job))
    except AgentoptError as error:
        say(error=str(error), user=isinstance(error, UserError))
    except OSError as error:
        say(
            error=f"{job.get('out', job['source'])}: {error.strerror or error}; make room, or give another folder.",
            user=False,
        )


def _line() -> bytes:
    """The first line of stdin, and not a byte more: the rest is watched without a buffer."""
    found = b""
    while not found.endswith(b"\n") and (one := os.read(0, 1)):
        found += one
    return found


if __name__ == "__main__":
    main()
