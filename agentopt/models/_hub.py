"""Whether a model is on the Hugging Face hub or in its cache, found out by one question before anything is loaded.

The loaders ask the hub again and again when nobody answers, which takes half a minute for a name that was mistyped on
a machine without a network.
"""

from __future__ import annotations

import difflib
import importlib
import os
from pathlib import Path
from typing import Any

from agentopt.models._errors import UnknownModel

_SECONDS = 5.0
"""Longest wait for the hub's answer; HF_HUB_ETAG_TIMEOUT is obeyed where it is set."""
_ALIASES = {"smollm2-135m-instruct": "embedded", "embedded": "embedded"}
_CLOSE = 0.7
"""How alike a name has to be to be proposed: 1 is the same."""


def check_on_hub(name: str, file: str = "config.json", *, spec: str = "") -> bool:
    """Refuse a name that neither the hub nor its cache has; whether only the cache can be used.

    Args:
        name: OWNER/NAME, or NAME.
        file: what a model of that kind has.
        spec: what the user wrote, where that can be no folder.

    Raises:
        UnknownModel: there is no such model, or the hub cannot be reached and the cache does not have it.
        ImportError: huggingface_hub is not installed.
    """
    hub: Any = importlib.import_module("huggingface_hub")
    errors: Any = importlib.import_module("huggingface_hub.errors")
    constants: Any = importlib.import_module("huggingface_hub.constants")
    seconds = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else _SECONDS
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(name, file), timeout=seconds)
        return False
    except errors.HFValidationError:
        missing = ["no hub model can have that name"]
    except (errors.EntryNotFoundError, errors.GatedRepoError):
        return False  # it is there; whoever loads it says what is the matter with it
    except errors.RepositoryNotFoundError:
        missing = [f"{constants.ENDPOINT} has no model of that name that you may read"]
    except (OSError, *errors.HfHubHTTPError.__bases__) as error:  # what its HTTP library raises when nobody answers
        if isinstance(error, errors.HfHubHTTPError):
            return False  # the hub answers, with something else than that it has no such model
        if isinstance(hub.try_to_load_from_cache(name, file), str):
            return True
        off = isinstance(error, errors.OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE is set" if off else f"{constants.ENDPOINT} cannot be reached ({_first_line(error)})"
        missing = [f"nothing in the hub's cache {constants.HF_HUB_CACHE}", why]
    *others, last = missing if spec else [f"no folder {Path(name).absolute()}", *missing]
    before = ", ".join(others) + ", and " if others else ""
    raise UnknownModel(f"model {spec or name!r}: {before}{last}{expected(spec or name)}")


def expected(name: str) -> str:
    """How a message about a model that is not there ends: a similar name that is, and what a name can be."""
    near = _nearest(name)
    forms = "a model folder, a .gguf file, 'embedded', or a hub model OWNER/NAME (fetched once while online)."
    return f"; did you mean {near!r}? Expected {forms}" if near else f"; expected {forms}"


def _nearest(name: str) -> str:
    wanted, best = name.lower(), (_CLOSE, "")
    for known, proposal in _known(Path(name)).items():
        for form in {known, known.rpartition("/")[2]}:
            # A name that was broken off is as near as one with another letter.
            for text in (form, form[: len(wanted) + 1]):
                alike = difflib.SequenceMatcher(None, wanted, text.lower()).ratio()
                best = max(best, (alike, proposal))
    return best[1]


def _known(path: Path) -> dict[str, str]:
    """Name to what to write, of models that are here: the embedded one, those in the hub's cache or beside the path."""
    found = dict(_ALIASES)
    try:
        constants: Any = importlib.import_module("huggingface_hub.constants")
        cached = sorted(Path(constants.HF_HUB_CACHE).glob("models--*"))
    except (ImportError, OSError):
        cached = []
    for folder in cached:
        name = folder.name.removeprefix("models--").replace("--", "/")
        found[name] = name
    parent = path.expanduser().parent
    try:
        beside = sorted(parent.iterdir())
    except OSError:
        beside = []
    for one in beside:
        if one.suffix in (".gguf", ".ggz") or (one / "config.json").is_file():
            found[str(path.parent / one.name)] = str(path.parent / one.name)
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
