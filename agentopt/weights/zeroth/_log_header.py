"""The header of a log: what a run is made of, how it stands in the file, and how two of them are compared."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from agentopt.errors import UserError
from agentopt.weights.load import need
from agentopt.weights.zeroth._fingerprint import fingerprint, names_fingerprint

MAGIC = b"\x89ZOLOG\r\n"
"""Not text, and changed by any transfer that translates the ends of lines."""
VERSION = 1
RNG = "philox4x32-10"
_PREFIX = struct.Struct("<8sII")
_LONGEST = 1 << 20


class HeaderCutOff(UserError):
    """The process died while it wrote the first bytes: no step followed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Everything that a step's result depends on, besides the step's own record.

    Attributes:
        base: fingerprint of the weights that the run began with.
        k: coefficients per step.
        method: name of the preset or rule.
        eps: radius of the probe.
        mask: which weights are tuned; thresholds are computed again from the base.
        density: share of the weights that the mask leaves.
        mask_update: whether the mask follows the weights.
        lr: base learning rate; each record has its own.
        schedule: what the learning rate does.
        seed: the run's seed, from which every step's seed follows.
        weight_decay: share of a weight that a step of learning rate 1 would take away.
        threads: torch's threads: a sum split among more of them is another sum.
        torch: torch's version.
        dtype: the weights' number format.
        names: fingerprint of the names of the tuned weights.
        probe: the fields of `Probe`.
        copies: variants per forward pass: a batch of another size may add in another order.
        device: `"cpu"` or `"cuda"`.
        data: fingerprint of the training data and of their order, where the caller has one.
        hyper: constants of the update rule.
    """

    base: str
    k: int
    method: str
    eps: float
    mask: str
    density: float
    mask_update: str
    lr: float
    schedule: Mapping[str, Any]
    seed: int
    weight_decay: float
    threads: int
    torch: str
    dtype: str
    names: str
    probe: Mapping[str, Any]
    copies: int
    device: str
    data: str = ""
    hyper: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def check(self, expect: Header, path: Path, ignore: Sequence[str] = ()) -> None:
        """Compare with the run that wants to use the log.

        Raises:
            UserError: they differ; the message names the first field, what was found and what was expected.
        """
        mine, theirs = _plain(self), _plain(expect)
        for name in mine:
            if name in ignore or mine[name] == theirs[name]:
                continue
            place, found, wanted = _first_difference(name, mine[name], theirs[name])
            hint = _HINTS.get(name, "give the run the settings it began with, or begin a new log")
            raise UserError(
                f"{path}: {_LABELS.get(place, place)}: the log was written with {found}, this run has {wanted}; "
                f"{hint.format(found=found)}."
            )


def header_of(optimizer: Any, *, base: str | None = None, k: int | None = None, data: str = "") -> Header:
    """The header of a run of a `ZerothOrder`, which must not have made a step yet.

    Args:
        optimizer: with its model, as the run begins.
        base: fingerprint of the model's weights, where it is known; None reads them all.
        k: coefficients per step; needed when every example has a direction of its own.
        data: fingerprint of the training data and their order; empty leaves them unchecked.

    Raises:
        UserError: steps were made already, so the weights are not the base; or `k` is needed.
    """
    torch = need("torch")
    if optimizer.step_number:
        raise UserError(f"log: found an optimizer that has made {optimizer.step_number} steps, expected a fresh one.")
    k = optimizer.scalars_per_step if k is None else k
    if k is None:
        raise UserError("log: with a direction per example, give k, the number of examples of a batch.")
    if base is None:
        every = optimizer.model.state_dict(keep_vars=True)
        base = fingerprint({id(tensor): (name, tensor) for name, tensor in reversed(every.items())}.values())
    tuned = [site.tensor for site in optimizer.sites]
    return Header(
        base=base,
        k=k,
        method=optimizer.method,
        eps=optimizer.eps,
        mask=optimizer.mask.kind,
        density=optimizer.mask.density,
        mask_update=optimizer.mask.update,
        lr=optimizer.lr,
        schedule=asdict(optimizer.schedule),
        seed=optimizer.seed,
        weight_decay=optimizer.weight_decay,
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        dtype="+".join(sorted({str(one.dtype).removeprefix("torch.") for one in tuned})),
        names=names_fingerprint(optimizer.parameters),
        probe=asdict(optimizer.probe),
        copies=optimizer.copies,
        device="+".join(sorted({one.device.type for one in tuned})),
        data=data,
        hyper=dict(optimizer.rule.hyper),
    )


_LABELS = {"base": "base model", "threads": "thread count", "torch": "torch version", "names": "tuned weights"}
_HINTS = {
    "base": "resume from the very weights that the run began with",
    "threads": "call torch.set_num_threads({found})",
    "torch": "install torch=={found}",
    "device": "run on {found}; a finished run may be replayed elsewhere with Log.read(..., ignore=...)",
    "dtype": "load the model in the log's number format",
    "names": "tune the same weights as before",
    "data": "train on the data that the run began with",
}


def _plain(header: Header) -> dict[str, Any]:
    """As it comes back from the file."""
    return json.loads(json.dumps(asdict(header)))


def _first_difference(name: str, mine: Any, theirs: Any) -> tuple[str, Any, Any]:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        here, there = cast("dict[str, Any]", mine), cast("dict[str, Any]", theirs)
        for key in sorted({*here, *there}):
            if here.get(key) != there.get(key):
                return _first_difference(f"{name}.{key}", here.get(key), there.get(key))
    return name, cast("Any", mine), cast("Any", theirs)


def pack_header(header: Header) -> bytes:
    """The bytes that begin a file."""
    content = {"version": VERSION, "rng": RNG, **_plain(header)}
    data = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return _PREFIX.pack(MAGIC, len(data), zlib.crc32(data)) + data


def read_header(descriptor: int, path: Path) -> tuple[Header, int]:
    """The header of a file, and where its records begin.

    Raises:
        HeaderCutOff: the file ends within it.
        UserError: it is not a log, is damaged, or was written by a later version.
    """
    start = os.pread(descriptor, _PREFIX.size, 0)
    if start[: len(MAGIC)] != MAGIC[: len(start)]:
        raise UserError(f"{path}: not a log of zeroth-order steps (it begins with {start[:8]!r}, expected {MAGIC!r}).")
    if len(start) < _PREFIX.size:
        raise HeaderCutOff(_cut_off(path))
    _, length, check = _PREFIX.unpack(start)
    if length > _LONGEST:
        raise _damaged(path, len(MAGIC))
    data = os.pread(descriptor, length, _PREFIX.size)
    if len(data) < length:
        raise HeaderCutOff(_cut_off(path))
    if zlib.crc32(data) != check:
        raise _damaged(path, _PREFIX.size)
    return _from_json(data, path), _PREFIX.size + length


def _cut_off(path: Path) -> str:
    return f"{path}: the file ends within its header, so no step was written; delete it and begin anew."


def _damaged(path: Path, place: int) -> UserError:
    return UserError(f"{path}: damaged in its header, from byte {place} on; take the file from a copy.")


def _from_json(data: bytes, path: Path) -> Header:
    content: dict[str, Any] = json.loads(data)
    version, rng = content.pop("version", None), content.pop("rng", None)
    if version != VERSION:
        raise UserError(f"{path}: found log version {version}, this agentopt reads {VERSION}; use a newer agentopt.")
    if rng != RNG:
        raise UserError(f"{path}: found the generator {rng!r}, this agentopt draws with {RNG!r}.")
    known = {one.name for one in fields(Header)}
    if set(content) != known:
        odd = ", ".join(sorted(set(content) ^ known))
        raise UserError(f"{path}: the header's fields are not those of log version {VERSION} (see {odd}).")
    return Header(**content)
