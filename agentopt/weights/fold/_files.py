"""Folders on disk.

META/     meta.json (options, hashes, thresholds, summary), init.safetensors (start, rates, token weights), tokenizer/,
          chat_template.jinja for servers, and base/ when meta-training changed the base's weights
ADAPTER/  adapter_config.json and adapter_model.safetensors as peft writes them (with `adapts="all"` a model folder),
          and fold.json (facts, hashes, recall, what the gate said)
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from agentopt.errors import RunError, UserError
from agentopt.weights import load
from agentopt.weights.adapters import _files as lora_files
from agentopt.weights.finetuning._folder import read_json, write_json, write_text
from agentopt.weights.finetuning._saving import quiet
from agentopt.weights.fold._adapter import Adapter
from agentopt.weights.fold._chat import chat_template
from agentopt.weights.fold._kit import Kit
from agentopt.weights.fold._run_folder import digest, read_tensors, write_tensors
from agentopt.weights.load import need
from agentopt.weights.zeroth._fingerprint import fingerprint

VERSION = 1
META, INIT, CARD, BASE, TOKENIZER = "meta.json", "init.safetensors", "fold.json", "base", "tokenizer"
CHAT_TEMPLATE = "chat_template.jinja"
_HEAD = ("options", "base", "meta_hash", "gate", "max_new", "result")


# --- what tensors are called, and their hashes ----------------------------------------------------------------------


def base_weights(kit: Kit) -> dict[str, Any]:
    """Weights of the base that meta-training has moved, by the names that the base gives them."""
    meta = kit.meta
    return {**meta.shared, **(meta.init if kit.options.adapts == "all" else {})}


def base_hash(names: Mapping[str, Any], kit: Kit) -> str:
    """A name for the base as it is now; `names` are its parameters before anything was attached."""
    moved = base_weights(kit)
    return fingerprint((name, moved.get(name, tensor)) for name, tensor in names.items())


def meta_hash(kit: Kit, base: str) -> str:
    """A name for the options and the meta-parameters, on a base of this hash."""
    own = stored_names(kit)
    tensors = fingerprint((name, tensor) for name, tensor in sorted(kit.named().items()) if name in own)
    return digest([kit.options.model_dump(mode="json"), base, tensors])


def stored_names(kit: Kit) -> set[str]:
    """What init.safetensors holds: the meta-parameters that base/ does not."""
    moved = set(base_weights(kit))
    kinds = {name: name.partition("/") for name in kit.named()}
    return {name for name, (kind, _, own) in kinds.items() if own not in moved or kind in ("rates", "token_weights")}


def plain_model(kit: Kit, values: Mapping[str, Any]) -> Any:
    """A copy of the model without adapters, these values in place of its own."""
    from agentopt.weights.adapters._layer import LoraLinear

    model = copy.deepcopy(kit.engine.model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.base)
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.data = values[name].detach().clone().to(parameter.device)
    first = next(iter(values.values()), None)
    return model if first is None else model.to(first.dtype)


# --- META ------------------------------------------------------------------------------------------------------------


def save_meta(path: Path, kit: Kit, tokenizer: Any, head: Mapping[str, Any]) -> None:
    """Write a META folder; meta.json comes last, so that a folder with it is whole.

    Raises:
        UserError: the path is a file.
        RunError: it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with quiet():
            tokenizer.save_pretrained(str(path / TOKENIZER))
            moved = base_weights(kit)
            if moved:
                plain_model(kit, moved).save_pretrained(str(path / BASE))
                tokenizer.save_pretrained(str(path / BASE))
    except FileExistsError:
        raise UserError(f"{path}: found a file, expected a folder to write into.") from None
    except (OSError, need("safetensors").SafetensorError) as error:
        raise RunError(f"{path}: cannot be written ({error}); make room and save it again.") from error
    own = stored_names(kit)
    write_tensors(path / INIT, {name: one for name, one in kit.named().items() if name in own}, {"version": VERSION})
    write_text(path / CHAT_TEMPLATE, chat_template(kit.codec))
    write_json(path / META, {"version": VERSION, **head})


def read_meta(path: str | Path) -> dict[str, Any]:
    """What meta.json holds.

    Raises:
        UserError: it is no META folder, or one of another version.
    """
    folder = Path(path).expanduser()
    head = read_json(folder / META)
    if head is None:
        running = " (its meta-training is not done: go on with it)" if (folder / "run.json").is_file() else ""
        raise UserError(f"{path}: found no {META}, expected a folder of meta-training{running}.")
    _check_card(head, str(path), META, _HEAD)
    base = cast("dict[str, Any]", head["base"]) if isinstance(head["base"], dict) else {}
    if not {"name", "hash", "dtype", "own"} <= base.keys():
        raise UserError(f"{path}: {META} lacks the name, hash, dtype or own of its base; make the folder again.")
    return head


def _check_card(card: Any, place: str, file: str, names: tuple[str, ...]) -> None:
    """Whether this is a JSON object of our version with these names.

    Raises:
        UserError: it is not.
    """
    if not isinstance(card, dict):
        raise UserError(f"{place}: {file} holds {type(card).__name__}, expected an object as `fold` writes it.")
    found = cast("dict[str, Any]", card)
    if found.get("version") != VERSION:
        raise UserError(f"{place}: {file} has version {found.get('version')!r}, expected {VERSION}.")
    missing = next((name for name in names if name not in found), None)
    if missing is not None:
        raise UserError(f"{place}: {file} lacks {missing!r}; it was cut or changed: make the folder again.")


def read_init(path: str | Path) -> dict[str, Any]:
    """Tensors of init.safetensors."""
    return read_tensors(Path(path).expanduser() / INIT)[0]


def read_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a META folder.

    Raises:
        UserError: it is not there or cannot be read.
    """
    folder = Path(path).expanduser() / TOKENIZER
    if not folder.is_dir():  # else its path would be looked up as a name on the hub
        raise UserError(f"{path}: found no {TOKENIZER}/, expected a folder of meta-training; give tokenizer=.")
    try:
        with quiet():
            return need("transformers").AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"{folder}: the tokenizer cannot be read ({first}); copy the folder again.") from None


def trained_base(path: str | Path, kit: Kit) -> dict[str, Any]:
    """Weights of base/ under the names of `state_dict`; {} when the base was not trained."""
    moved = base_weights(kit)
    if not moved:
        return {}
    own = dict(load.model(Path(path).expanduser() / BASE, device="cpu")[0].named_parameters())
    kind = "init" if kit.options.adapts == "all" else "shared"
    return {f"{kind if name in kit.meta.init else 'shared'}/{name}": own[name] for name in moved}


# --- ADAPTER ---------------------------------------------------------------------------------------------------------


def save_adapter(
    adapter: Adapter, path: Path, kit: Kit, tokenizer: Any, base: str | None, extra: Mapping[str, Any]
) -> None:
    """Write an adapter folder; `base` is what peft is told the base is, None for what the model says.

    Raises:
        RunError: it cannot be written.
    """
    with contextlib.suppress(OSError):
        (path / CARD).unlink()  # until the new one is whole, nothing says that another knowledge base is in here
    if kit.options.adapts == "lora":
        with _held(kit, adapter.state) as adapters:
            adapters.save(path)
        if base is not None:
            config = read_json(path / "adapter_config.json")
            write_json(path / "adapter_config.json", {**(config or {}), "base_model_name_or_path": base})
    else:
        try:
            with quiet():
                values = {**base_weights(kit), **adapter.state}
                plain_model(kit, values).save_pretrained(str(path))
                tokenizer.save_pretrained(str(path))
        except (OSError, need("safetensors").SafetensorError) as error:
            raise RunError(f"{path}: cannot be written ({error}); make room and save it again.") from error
    created = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(
        path / CARD, {"version": VERSION, "adapts": kit.options.adapts, **adapter.card(), **extra, "created": created}
    )


def read_adapter(path: str | Path, kit: Kit, base: str) -> Adapter:
    """The adapter of a folder.

    Args:
        path: of `Adapter.save`.
        kit: what it is for.
        base: hash of the base there.

    Raises:
        UserError: no such folder, or an adapter for another base, or another form of adapter.
    """
    folder = Path(path).expanduser()
    card = read_json(folder / CARD)
    if card is None:
        raise UserError(f"adapter {str(path)!r}: found no {CARD}, expected a folder that `fold` wrote.")
    _check_card(card, f"adapter {str(path)!r}", CARD, ("base_hash", "adapts"))
    if card["base_hash"] != base:
        raise UserError(
            f"adapter {str(path)!r}: it was folded for another base (hash {card['base_hash'][:12]}, this one has "
            f"{base[:12]}); fold its documents again with this folder, or ask the folder that made it."
        )
    if card["adapts"] != kit.options.adapts:
        raise UserError(
            f"adapter {str(path)!r}: it holds {card['adapts']!r}, expected {kit.options.adapts!r} as in this folder."
        )
    if kit.options.adapts == "lora":
        with _held(kit, {}) as adapters:
            _check_fits(folder, kit)
            adapters.load(folder)
            state = adapters.state()
    else:
        own = dict(load.model(folder, device="cpu")[0].named_parameters())
        state = {name: own[name].detach().clone().to(tensor.device) for name, tensor in kit.meta.init.items()}
    try:
        return Adapter.from_card(card, state)
    except (KeyError, TypeError) as error:
        raise UserError(f"adapter {str(path)!r}: {CARD} lacks {error}; fold its documents again.") from error


def _check_fits(folder: Path, kit: Kit) -> None:
    """A stored adapter says which layers it has: all of them must be adapted here."""
    strange = [name for name in lora_files.load(folder) if f"{name}.lora_A" not in kit.meta.init]
    if strange:
        raise UserError(f"adapter {str(folder)!r}: has factors for {strange[0]}, which this folder does not adapt.")


@contextlib.contextmanager
def _held(kit: Kit, state: Mapping[str, Any]) -> Generator[Any]:
    """Within, the model's own adapter holds a state; afterwards it is what it was."""
    adapters = kit.engine.adapters
    before = adapters.state()
    try:
        _put(adapters, state)
        yield adapters
    finally:
        _put(adapters, before)


def _put(adapters: Any, state: Mapping[str, Any]) -> None:
    own = adapters.parameters()
    with need("torch").no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
