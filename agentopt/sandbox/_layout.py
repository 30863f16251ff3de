"""Which paths of this machine a sandboxed interpreter needs to see, and through which symbolic links it finds them."""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field

_SYSTEM = (
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/libx32",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/usr/share/zoneinfo",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/nix/store",
    "/gnu/store",
)
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


@dataclass(slots=True)
class Layout:
    """What a root for the worker holds: folders and files shown read-only, and symbolic links made anew."""

    binds: list[str] = field(default_factory=list[str])
    links: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    devices: list[str] = field(default_factory=list[str])


def interpreter_layout() -> Layout:
    """Return the layout for this interpreter: standard library, installed packages, its binary, system libraries.

    Narrow on purpose: an environment made in a project's folder shows its packages, not the project.
    """
    wanted = [sys.executable, f"{sys.prefix}/pyvenv.cfg", f"{sys.base_prefix}/lib", *_SYSTEM]
    wanted += [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    wanted += site.getsitepackages()
    layout = resolve_paths(path for path in wanted if os.path.exists(path))
    layout.devices = [device for device in DEVICES if os.path.exists(device)]
    return layout


def resolve_paths(paths: Iterable[str]) -> Layout:
    """Follow the links on the way to each path; return the real paths, none inside another, and the links outside them.

    On a system with a merged /usr, /lib is a link to usr/lib: the worker gets the same link.
    """
    links: dict[str, str] = {}
    real = sorted({_follow(os.path.abspath(path), links) for path in paths})
    binds: list[str] = []
    for path in real:  # sorted: a folder comes before what lies in it, though not always directly
        if not any(_inside(path, known) for known in binds):
            binds.append(path)
    return Layout(binds, [(path, to) for path, to in links.items() if not any(_inside(path, known) for known in binds)])


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _follow(path: str, links: dict[str, str]) -> str:
    current = "/"
    left = [part for part in path.split("/") if part]
    for _ in range(1000):
        if not left:
            break
        part = left.pop(0)
        if part == "..":
            current = os.path.dirname(current)
            continue
        if part == ".":
            continue
        step = os.path.join(current, part)
        if os.path.islink(step):
            target = os.readlink(step)
            links[step] = target
            if target.startswith("/"):
                current = "/"
            left = [piece for piece in target.split("/") if piece] + left
        else:
            current = step
    return current
