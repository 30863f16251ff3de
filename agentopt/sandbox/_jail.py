"""The namespace tier from the inside: a script that shuts itself in and then becomes the worker.

Standard library only, run as `python -I -S _jail.py JSON`; nothing of agentopt is imported here. Three processes:

* the outer one makes the namespaces (or starts bubblewrap), then waits; it ends everything when its standard input is
  closed, so nothing outlives the process that asked for the sandbox;
* process 1 of the new namespace builds a root that holds only what the interpreter needs, gives up every privilege,
  puts Landlock around itself and reaps;
* the worker runs below it, behind a filter of system calls.

What goes wrong is one line on standard error and exit code 77.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import select
import signal
import struct
import sys
from typing import Any, NoReturn

INSIDE = 1000
"""User and group id that the worker sees itself as."""
FAILED = 77
NEW_USER, NEW_MOUNT, NEW_PID, NEW_NET, NEW_IPC, NEW_UTS, NEW_CGROUP = (
    0x10000000, 0x00020000, 0x20000000, 0x40000000, 0x08000000, 0x04000000, 0x02000000,
)  # fmt: skip
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
DETACH = 2
NO_NEW_PRIVS, DEATH_SIGNAL, DUMPABLE, SECCOMP, SUBREAPER = 38, 1, 4, 22, 36
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446  # the same on every processor

# Landlock's rights, by the version of its interface that brought them.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
MAKE_DEVICES = 1 << 6 | 1 << 11
RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
READ = EXECUTE | READ_FILE | READ_DIR

# System calls that the worker has no use for: new processes and threads, sockets (some families know no namespaces),
# memory that no limit counts, other processes, mounts, keys, and the parts of the kernel with the longest records.
_COMMON = (*range(425, 434), 435, 438, 440, 442)  # io_uring, mount, clone3, pidfd_getfd, process_madvise
_DENIED = {
    "x86_64": (0xC000003E, (
        56, 57, 58, 41, 29, 64, 68, 240, 319, 101, 310, 311, 312, 155, 161, 165, 166, 272, 308, 248, 249, 250,
        135, 175, 246, 298, 303, 304, 313, 321, 323,
    )),
    "aarch64": (0xC00000B7, (
        220, 198, 194, 190, 186, 180, 279, 117, 270, 271, 272, 41, 51, 40, 39, 97, 268, 217, 218, 219,
        92, 105, 104, 241, 264, 265, 273, 280, 282,
    )),
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """Return the result of a C call, or raise what it set as errno."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def unshare() -> None:
    """Enter new namespaces of every kind."""
    flags = NEW_USER | NEW_MOUNT | NEW_PID | NEW_NET | NEW_IPC | NEW_UTS | NEW_CGROUP
    if _libc.unshare(flags) == 0:
        return
    code = ctypes.get_errno()
    reason = {
        errno.EPERM: "user namespaces are not allowed here (by a container's seccomp profile or a sysctl)",
        errno.ENOSPC: "user namespaces are switched off or used up (sysctl user.max_user_namespaces)",
        errno.EINVAL: "this kernel has not every kind of namespace",
    }.get(code, os.strerror(code))
    raise OSError(code, reason)


def call(number: int, what: str, *arguments: Any) -> int:
    """Make a system call that the C library has no function for."""
    long = [ctypes.c_long(item) if isinstance(item, int) else item for item in arguments]
    return check(_libc.syscall(ctypes.c_long(number), *long), what)


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Mount a file system, or change a mount."""
    words = [text.encode() or None for text in (source, target, kind)]
    check(_libc.mount(*words, ctypes.c_ulong(flags), options.encode() or None), f"mount {target}")


def landlock_abi() -> int:
    """Return the version of Landlock's interface, 0 when the kernel has none."""
    return max(0, _libc.syscall(ctypes.c_long(LANDLOCK_CREATE), None, ctypes.c_long(0), ctypes.c_long(1)))


# --- the outer process -----------------------------------------------------------------------------------------------


def enter_namespaces(host_id: int | None) -> bool:
    """Unshare everything. `host_id` is the worker's id outside, given when this is the superuser; whether it got it."""
    if host_id is not None and enter_as_superuser(host_id):
        return True
    user, group = os.geteuid(), os.getegid()
    if host_id is None:
        unshare()
    else:  # a superuser that may not map another id: of what holds back processes, the call filter is left
        user = group = 0
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{INSIDE} {user} 1")
    write("/proc/self/gid_map", f"{INSIDE} {group} 1")
    return False


def enter_as_superuser(host_id: int) -> bool:
    """Unshare, with two ids mapped: the superuser is exempt from the limit on processes in every namespace."""
    me = os.getpid()
    ready, go = os.pipe()
    helper = os.fork()  # only a process outside may map two ids
    if helper == 0:
        code = 1
        try:
            os.read(ready, 1)
            for name in ("uid_map", "gid_map"):
                write(f"/proc/{me}/{name}", f"0 0 1\n{INSIDE} {host_id} 1")
            code = 0
        finally:
            os._exit(code)
    try:
        unshare()
    finally:
        os.write(go, b"x")
        _, status = os.waitpid(helper, 0)
    return status == 0


def write(path: str, text: str) -> None:
    """Write a kernel file in one go."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def supervise(config: dict[str, Any]) -> NoReturn:
    """Start process 1, wait for its end or for the end of the parent, and end in the same way."""
    null = os.open("/dev/null", os.O_RDWR)
    if config["bwrap"]:
        check(_libc.prctl(SUBREAPER, 1, 0, 0, 0), "prctl")  # its process 1 is waited for too
        child = os.posix_spawn(config["bwrap"][0], config["bwrap"], os.environ)
    else:
        if not enter_namespaces(config["host_id"]):
            config["host_id"] = None
        child = os.fork()
        if child == 0:
            guarded(lambda: become_init(config))
    os.dup2(null, 1)
    os.dup2(null, 2)
    poll = select.poll()
    poll.register(0, 0)  # hang-up only: the requests are the worker's to read
    process = os.pidfd_open(child)
    poll.register(process, select.POLLIN)
    while not any(descriptor == process for descriptor, _ in poll.poll()):
        os.kill(child, signal.SIGKILL)
        poll.unregister(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    end_like(code)


def end_like(code: int) -> NoReturn:
    """End with this exit code, or by the signal that it stands for."""
    number = -code if code < 0 else code - 128
    if 0 < number < signal.NSIG:
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(code if code >= 0 else 128 + number)


# --- process 1 -------------------------------------------------------------------------------------------------------


def become_init(config: dict[str, Any]) -> NoReturn:
    """Build the root, give up privileges, start the worker, reap until it ends."""
    build_root(config)
    if config["host_id"] is not None:
        os.setgroups([])
        os.setresgid(INSIDE, INSIDE, INSIDE)
        os.setresuid(INSIDE, INSIDE, INSIDE)
    confine(config)
    check(_libc.prctl(DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "prctl")  # a change of ids would have taken it back
    worker = os.fork()
    if worker == 0:
        guarded(lambda: become_worker(config))
    check(_libc.prctl(DUMPABLE, 0, 0, 0, 0), "prctl")
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == worker:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def build_root(config: dict[str, Any]) -> None:
    """Make a small read-only root in memory: interpreter, system libraries, a few devices, /proc, a folder."""
    mount("", "/", "", RECURSIVE | PRIVATE)
    base = "/tmp" if os.path.isdir("/tmp") else "/usr"
    mount("tmpfs", base, "tmpfs", NOSUID | NODEV, "mode=0755,size=1m")
    os.chdir(base)
    os.mkdir(".host")
    check(_libc.pivot_root(b".", b".host"), "pivot_root")
    os.chdir("/")
    for source, target in config["binds"]:
        bind("/.host" + source, target)
        read_only(target)
    for device in config["devices"]:
        bind("/.host" + device, device)
    for path, target in config["links"]:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(target, path)
    os.mkdir("/proc")
    for options in ("subset=pid,hidepid=2", ""):
        try:
            mount("proc", "/proc", "proc", NOSUID | NODEV | NOEXEC, options)
            break
        except OSError:  # refused where the host's own /proc is partly hidden: then there is none, which is stricter
            continue
    os.mkdir(config["folder"])
    mount_folder(config)
    check(_libc.umount2(b"/.host", DETACH), "umount")
    os.rmdir("/.host")
    mount("", "/", "", REMOUNT | BIND | RDONLY | NOSUID | NODEV)
    name = b"sandbox"
    check(_libc.sethostname(name, len(name)), "sethostname")
    os.chdir(config["folder"])


def mount_folder(config: dict[str, Any]) -> None:
    """The worker's folder: in memory, bounded in bytes and in files, without programs."""
    size = f"mode=0700,size={config['folder_bytes']},nr_inodes=4096,uid={INSIDE},gid={INSIDE}"
    mount("tmpfs", config["folder"], "tmpfs", NOSUID | NODEV | NOEXEC, size)


def bind(source: str, target: str) -> None:
    """Show what lies at `source` also at `target`."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    mount(source, target, "", BIND | RECURSIVE)


def read_only(target: str) -> None:
    """Make a mount and those below it read-only."""
    attributes = struct.pack("QQQQ", RDONLY | NOSUID | NODEV, 0, 0, 0)
    call(MOUNT_SETATTR, f"read-only {target}", -100, target.encode(), 0x8000, attributes, len(attributes))


# --- what the worker is shut in with ---------------------------------------------------------------------------------


def confine(config: dict[str, Any]) -> None:
    """No new privileges, Landlock, no capabilities."""
    check(_libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    landlock([target for _, target in config["binds"]], config["devices"], config["folder"])
    header = struct.pack("Ii", 0x20080522, 0)
    check(_libc.capset(header, bytes(24)), "capset")


def landlock(readable: list[str], devices: list[str], folder: str) -> None:
    """Allow reading below `readable`, writing below `folder`, and nothing else. Without Landlock there is the root."""
    abi = landlock_abi()
    if abi == 0:
        return
    handled = RIGHTS[max(version for version in RIGHTS if version <= abi)]
    words = [handled] + [3] * (abi >= 4) + [3] * (abi >= 6)  # TCP; abstract sockets and signals
    attributes = struct.pack(f"{len(words)}Q", *words)
    ruleset = call(LANDLOCK_CREATE, "landlock", attributes, len(attributes), 0)
    rules = [(path, READ) for path in [*readable, "/proc"]]
    rules += [(path, READ_FILE | WRITE_FILE) for path in devices]
    rules.append((folder, handled & ~(MAKE_DEVICES | EXECUTE)))
    for path, rights in rules:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            rights &= EXECUTE | READ_FILE | WRITE_FILE | TRUNCATE
        rule = struct.pack("=Qi", rights & handled, descriptor)
        call(LANDLOCK_ADD, f"landlock {path}", ruleset, 1, rule, 0)
        os.close(descriptor)
    call(LANDLOCK_RESTRICT, "landlock", ruleset, 0)
    os.close(ruleset)


def filter_calls() -> None:
    """Refuse the system calls of the list with EPERM; any other processor mode than the native one ends the worker."""
    known = _DENIED.get(platform.machine())
    if known is None:
        return  # the limit on processes, the namespaces and Landlock hold here too
    architecture, numbers = known
    denied = sorted({*numbers, *_COMMON})
    load, equal, above, answer = 0x20, 0x15, 0x35, 0x06
    refuse, allow, kill = 0x00050001, 0x7FFF0000, 0x80000000
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]
    program.append((above, len(denied) + 1, 0, 0x40000000))  # the x32 numbers of the same calls
    program += [(equal, len(denied) - place, 0, number) for place, number in enumerate(denied)]
    program += [(answer, 0, 0, allow), (answer, 0, 0, refuse)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    check(_libc.prctl(SECCOMP, 2, header, 0, 0), "seccomp")


def become_worker(config: dict[str, Any]) -> NoReturn:
    """Leave the process group that the parent ends, filter, and run the worker."""
    os.setsid()
    filter_calls()
    os.execve(config["command"][0], config["command"], os.environ)


def guarded(work: Any) -> NoReturn:
    """Run something that never returns; a failure is one line on standard error."""
    try:
        work()
    except BaseException as error:  # noqa: BLE001 - the last words of this process, whatever happened
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        where = f" {error.filename}" if isinstance(error, OSError) and error.filename else ""
        os.write(2, f"{text}{where}\n".encode())
    os._exit(FAILED)


def main() -> NoReturn:
    """Stage "supervise" is the outer process; "confine" is the step that bubblewrap runs inside."""
    config = json.loads(sys.argv[1])
    if config["stage"] == "supervise":
        guarded(lambda: supervise(config))

    def inside() -> None:
        with contextlib.suppress(OSError):  # not allowed everywhere; bubblewrap's folder has a bound in bytes alone
            mount_folder(config)
            os.chdir(config["folder"])
        confine(config)
        become_worker(config)

    guarded(inside)


if __name__ == "__main__":
    main()
