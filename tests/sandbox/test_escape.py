"""The escape suite: what hostile code tries in the namespace tier. Nothing gets through, and the next call works.

The code under test imports whatever it likes: the import allow-list is a convenience, not what holds it back.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import RunError
from agentopt.graph import CodeError, CodeTimeout, Used, WorkerDied
from agentopt.sandbox import Limits, NamespaceTier, RunnerPool, WorkerRunner

MODULES = (
    "ctypes", "errno", "fcntl", "gc", "mmap", "os", "pathlib", "resource", "shutil", "signal", "socket",
    "subprocess", "sys", "threading", "time",
)  # fmt: skip
USES = [Used(name, "module", name) for name in MODULES]
LIMITS = Limits(seconds=10.0, memory_bytes=256 << 20, result_bytes=1 << 20, file_bytes=1 << 20, folder_bytes=4 << 20)
WAYS = [way for way in ("own", "bwrap") if way == "own" or shutil.which("bwrap")]
TIERS = {way: NamespaceTier(way) for way in WAYS}


class Cell:
    """A runner in the namespace tier, with a check that the next call works."""

    def __init__(self, runner: WorkerRunner) -> None:
        self.runner = runner

    def run(self, body: str, *args: object) -> Any:
        """Run the lines as a function's body, with `args` as `a`."""
        source = "def f(*a):\n" + "".join(f"    {line}\n" for line in body.strip("\n").splitlines())
        return self.runner.call(self.runner.compile(source, "f", USES), args, {})

    def refused(self, body: str, *args: object, error: type[BaseException] = OSError) -> None:
        """The body fails where the kernel says no."""
        with pytest.raises(error) as caught:
            self.run(body, *args)
        assert not isinstance(caught.value, (CodeTimeout, WorkerDied))
        self.works()

    def settle(self) -> None:
        """Wait for the end of a worker that was killed or ends itself."""
        pid = self.runner.pid
        end = time.monotonic() + 60
        while pid is not None and _alive(pid) and time.monotonic() < end:
            time.sleep(0.01)

    def works(self) -> None:
        assert self.run("return a[0] + 1", 1) == 2


@pytest.fixture(scope="module", params=WAYS)
def shared(request: pytest.FixtureRequest) -> Iterator[WorkerRunner]:
    tier = TIERS[request.param]
    reason = tier.available()
    if reason is not None:
        pytest.skip(f"the namespace tier ({request.param}) does not work here: {reason}")
    with WorkerRunner(LIMITS, tier=tier) as runner:
        yield runner


@pytest.fixture
def cell(shared: WorkerRunner) -> Iterator[Cell]:
    cell = Cell(shared)
    yield cell
    cell.works()


@pytest.fixture
def hasty(shared: WorkerRunner) -> Iterator[Cell]:
    """A cell of the same tier with little time."""
    with WorkerRunner(Limits(seconds=0.4, memory_bytes=256 << 20), tier=shared.tier) as runner:
        cell = Cell(runner)
        cell.works()
        yield cell
        cell.works()


# --- network ---------------------------------------------------------------------------------------------------------


def test_no_tcp_to_a_listener_of_the_parent(cell: Cell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        cell.refused("socket.create_connection(('127.0.0.1', a[0]), 2)", server.getsockname()[1])
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_udp_to_the_parent(cell: Cell) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(0.05)
        address = list(receiver.getsockname())
        cell.refused("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', tuple(a[0]))", address)
        with pytest.raises(TimeoutError):
            receiver.recv(1)


def test_no_unix_sockets_of_the_parent_neither_abstract_nor_in_a_folder(cell: Cell, tmp_path: Path) -> None:
    names = [f"\0agentopt-{os.getpid()}", str(tmp_path / "s")]
    for name in names:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
            server.listen()
            cell.refused("socket.socket(socket.AF_UNIX).connect(a[0])", name)


@pytest.mark.parametrize("family", ["AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK", "AF_ALG"])
def test_no_other_family_reaches_out(cell: Cell, family: str) -> None:
    body = f"""
s = socket.socket(getattr(socket, {family!r}), socket.SOCK_RAW if {family!r} == 'AF_NETLINK' else socket.SOCK_STREAM)
s.connect({{'AF_INET6': ('::1', 80), 'AF_VSOCK': (2, 80)}}.get({family!r}, ('lo', 0)))
"""
    cell.refused(body, error=(OSError, TypeError))  # pyright: ignore[reportArgumentType]


# --- reading ---------------------------------------------------------------------------------------------------------


def test_home_system_and_working_folder_are_not_there(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    home = Path.home()
    for path in (str(secret), str(home / ".ssh" / "id_rsa"), "/etc/shadow", "/etc/passwd", "/etc/hostname",
                 "/var/log/syslog", "/proc/1/environ", "/proc/kcore", "/sys/kernel/notes", "/dev/mem"):  # fmt: skip
        cell.refused("open(a[0], 'rb').read(1)", path)
    for folder in (str(tmp_path), str(home), os.getcwd(), "/", "/etc", "/root", "/home", "/var", "/sys", "/run"):
        cell.refused("os.listdir(a[0])", folder)
    cell.refused("os.chdir(a[0])", str(tmp_path))


def test_own_secrets_of_the_project_are_not_there(cell: Cell) -> None:
    for path in (Path(__file__), Path(__file__).parents[2] / "pyproject.toml"):
        assert path.exists()
        cell.refused("open(a[0]).read()", str(path))


def test_environment_of_the_parent_is_not_there(shared: WorkerRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_API_KEY", "sk-123")
    with WorkerRunner(LIMITS, tier=shared.tier) as runner:
        cell = Cell(runner)
        assert "SECRET_API_KEY" not in cell.run("return dict(os.environ)")
        shown = """
found = []
for name in ['self', *filter(str.isdigit, os.listdir('/proc'))]:
    for file in ('environ', 'cmdline'):
        try:
            found.append(open(f'/proc/{name}/{file}', 'rb').read().decode('latin-1'))
        except OSError:
            pass
return found
"""
        assert "SECRET_API_KEY" not in str(cell.run(shown))
        assert str(os.getpid()) not in cell.run("return os.listdir('/proc')")


def test_relative_ways_and_links_lead_nowhere(cell: Cell, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    cell.refused("return open('../../../..' + a[0]).read()", str(secret))
    cell.refused("os.symlink(a[0], 'link')\nreturn open('link').read()", str(secret))
    cell.refused("os.link(a[0], 'hard')", str(secret))
    cell.refused("return open('/proc/1/root' + a[0]).read()", str(secret))
    cell.refused("return open('/proc/self/root' + a[0]).read()", str(secret))


# --- writing ---------------------------------------------------------------------------------------------------------


def test_nothing_is_written_outside_the_folder(cell: Cell, tmp_path: Path) -> None:
    for folder in (str(tmp_path), "/", "/usr/lib", "/dev", "/var/tmp", "/etc", str(Path.home())):
        cell.refused("open(a[0] + '/planted', 'w')", folder)
        cell.refused("os.mkdir(a[0] + '/planted')", folder)
    assert list(tmp_path.iterdir()) == []


def test_the_interpreter_the_libraries_and_the_worker_cannot_be_changed(cell: Cell) -> None:
    for name in (os.__file__, sys.executable, "/worker.py", "/etc/ld.so.cache"):
        cell.refused("open(a[0], 'r+b')", name)
        cell.refused("os.unlink(a[0])", name)
        cell.refused("os.chmod(a[0], 0o777)", name)
    cell.refused("open(os.path.dirname(json.__file__) + '/x.py', 'w')\n".replace("json", "subprocess"))


def test_symbolic_links_left_behind_take_nothing_with_them(shared: WorkerRunner, tmp_path: Path) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("kept")
    plant = "os.symlink(a[0], 'out')\nos.symlink(a[0] + '/kept.txt', 'file')\nos.mkdir('d')\nos.symlink(a[0], 'd/out')"
    runners = [WorkerRunner(LIMITS, tier=shared.tier), WorkerRunner(LIMITS)]  # the process tier has a folder to remove
    for runner in runners:
        with runner:
            Cell(runner).run(plant, str(tmp_path))
    assert kept.read_text() == "kept"


def test_no_program_and_no_device_comes_from_the_folder(cell: Cell) -> None:
    cell.refused("open('x', 'w').write('#!/usr/bin/python3')\nos.chmod('x', 0o755)\nos.execv('/tmp/x', ['x'])")
    cell.refused("os.mknod('device', 0o600 | 0o060000, os.makedev(254, 0))")


def test_disk_is_bounded_by_file_in_all_and_by_number(cell: Cell) -> None:
    cell.refused("open('big', 'wb').write(b'x' * (2 << 20))")
    cell.refused("for n in range(100): open(f'f{n}', 'wb').write(b'x' * (1 << 19))")
    cell.run("for name in os.listdir('.'): shutil.rmtree(name) if os.path.isdir(name) else os.unlink(name)")
    if "nr_inodes" in cell.run("return open('/proc/self/mounts').read()"):  # bubblewrap may not be let to set it
        cell.refused("for n in range(100_000): open(f'f{n}', 'w').close()")
    cell.run("for name in os.listdir('.'): shutil.rmtree(name) if os.path.isdir(name) else os.unlink(name)")
    cell.refused("fd = os.open('s', os.O_CREAT | os.O_RDWR)\nos.posix_fallocate(fd, 0, 1 << 40)")
    cell.refused("os.memfd_create('m')")


# --- processes, memory, time -----------------------------------------------------------------------------------------


def test_fork_bombs_do_not_begin(cell: Cell) -> None:
    cell.refused("while True: os.fork()")
    cell.refused("while True: subprocess.Popen([sys.executable, '-c', 'pass'])")
    cell.refused("while True: os.posix_spawn(sys.executable, ['python'], {})")
    assert cell.run("return os.system('true')") != 0
    raw = """
libc = ctypes.CDLL(None, use_errno=True)
return [libc.syscall(number, 0, 0, 0, 0, 0) for number in ((56, 57, 58, 435) if a[0] == 'x86_64' else (220, 435))]
"""
    assert set(cell.run(raw, os.uname().machine)) == {-1}


def test_thread_bombs_do_not_begin(cell: Cell) -> None:
    cell.refused("while True: threading.Thread(target=time.sleep, args=(60,)).start()", error=RuntimeError)


def test_memory_is_bounded(cell: Cell) -> None:
    cell.refused("keep = []\nwhile True: keep.append(bytearray(1 << 20))", error=MemoryError)
    cell.refused("mmap.mmap(-1, 1 << 30)")
    shared_memory = "libc = ctypes.CDLL(None)\nreturn libc.shmget(0, 1 << 20, 0o1600)"
    assert cell.run(shared_memory) == -1
    cell.refused("resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))", error=(OSError, ValueError))  # pyright: ignore[reportArgumentType]
    cell.refused("resource.setrlimit(resource.RLIMIT_NPROC, (100, 100))", error=(OSError, ValueError))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "body",
    [
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "for n in {1, *range(3, 9), *range(10, 19)}: signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\ntime.sleep(60)",
        "return 9 ** 9 ** 9",
    ],
)
def test_endless_loops_are_killed(hasty: Cell, body: str) -> None:
    with pytest.raises(CodeTimeout):
        hasty.run(body)
    hasty.works()


def test_huge_results_and_prints_are_bounded(cell: Cell) -> None:
    cell.refused("return 'x' * (20 << 20)", error=ValueError)
    cell.refused("raise Exception('x' * (20 << 20))", error=RunError)
    cell.refused("a = []\nfor _ in range(5000): a = [a]\nreturn a", error=TypeError)
    assert (
        cell.run("for _ in range(300): print('x' * 100_000)\nfor _ in range(300): os.write(1, b'y' * 100_000)") is None
    )
    assert cell.run("for _ in range(300): os.write(2, b'y' * 100_000)") is None
    assert cell.run("return sys.stdin.read() if sys.stdin else ''") == ""


# --- other processes -------------------------------------------------------------------------------------------------


def test_the_parent_cannot_be_seen_signalled_or_traced(cell: Cell) -> None:
    parent = os.getpid()
    cell.refused("os.kill(a[0], 0)", parent)
    cell.refused("os.killpg(a[0], signal.SIGKILL)", os.getpgid(0))
    cell.refused("os.getsid(a[0])", parent)
    assert cell.run("return ctypes.CDLL(None).ptrace(16, a[0], 0, 0)", parent) == -1
    assert cell.run("return ctypes.CDLL(None).ptrace(0, 0, 0, 0)") == -1
    assert cell.run("return ctypes.CDLL(None).process_vm_readv(a[0], None, 0, None, 0, 0)", parent) == -1
    cell.refused("open(f'/proc/{a[0]}/mem', 'rb')", parent)


@pytest.mark.parametrize(
    "body", ["os.kill(0, signal.SIGKILL)", "os.kill(1, signal.SIGKILL)\nos.kill(-1, signal.SIGKILL)\nreturn 1"]
)
def test_signals_to_every_process_in_reach_touch_only_the_worker(cell: Cell, body: str) -> None:
    with pytest.raises(CodeError):
        assert cell.run(body) != 1
    cell.works()


def test_nothing_is_left_after_close(shared: WorkerRunner) -> None:
    with WorkerRunner(LIMITS, tier=shared.tier) as runner:
        Cell(runner).works()
        pid = runner.pid
        assert pid is not None
        family = _descendants(pid)
        assert len(family) >= 2
    assert [one for one in (pid, *family) if _alive(one)] == []


def test_a_looping_worker_dies_with_its_killed_parent(shared: WorkerRunner) -> None:
    """Even when it has put away the alarm that would end it."""
    way = shared.tier.way if isinstance(shared.tier, NamespaceTier) else "own"
    code = f"""
import os, threading, time
from agentopt.graph import Used
from agentopt.sandbox import Limits, NamespaceTier, WorkerRunner
runner = WorkerRunner(Limits(seconds=60), tier=NamespaceTier({way!r}))
source = "def f():\\n signal.setitimer(signal.ITIMER_REAL, 0)\\n while True: pass"
identity = runner.compile(source, "f", [Used("signal", "module", "signal")])
threading.Thread(target=runner.call, args=(identity, (), {{}}), daemon=True).start()
time.sleep(0.3)
print(runner.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        family = [pid, *_descendants(pid)]
        assert len(family) >= 3
        parent.kill()
    for _ in range(500):
        if not any(_alive(one) for one in family):
            break
        time.sleep(0.02)
    assert [one for one in family if _alive(one)] == []


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[1]) == pid:
                child = int(stat.parent.name)
                found += [child, *_descendants(child)]
        except OSError:
            continue
    return found


# --- the protocol ----------------------------------------------------------------------------------------------------

EVERY_PIPE = """
def each(work):
    for n in range(3, 64):
        try:
            work(n)
        except OSError:
            pass
"""


@pytest.mark.parametrize(
    "work",
    [
        "each(lambda n: os.write(n, b'{\"ok\": 42}\\n'))",
        "each(lambda n: os.write(n, b'0123456789abcdef {\"ok\": 42}\\n'))",
        "each(lambda n: os.write(n, b'\\xff\\x00 junk without an end'))",
        "each(lambda n: os.write(n, b'\\n' * 1000))",
        "each(lambda n: os.write(n, b'[' * 60000 + b'\\n'))",
        "each(os.close)",
        "each(lambda n: fcntl.fcntl(n, fcntl.F_SETFL, os.O_NONBLOCK))\neach(lambda n: os.read(n, 9))\neach(os.close)",
    ],
)
def test_writing_to_the_pipes_or_closing_them_is_one_failed_call(cell: Cell, work: str) -> None:
    with pytest.raises(
        WorkerDied, match=r"died during the call: it (broke the protocol|was ended|ended with|closed its pipes)"
    ):
        cell.run(EVERY_PIPE + work + "\nreturn 7")
    cell.works()


def test_junk_written_after_the_reply_never_becomes_the_next_reply(cell: Cell) -> None:
    """A finalizer that runs once the reply is out writes a reply of its own."""
    body = (
        EVERY_PIPE
        + """
class Late:
    def __del__(self):
        each(lambda n: os.write(n, b'0123456789abcdef {"ok": 42}\\n'))
sys.modules['late'] = Late()
signal.signal(signal.SIGALRM, lambda *_: sys.modules.pop('late', None))
return 5
"""
    )
    assert cell.run(body) == 5
    for value in range(5):
        assert cell.run("return a[0]", value) == value


def test_an_endless_reply_is_cut_off(cell: Cell) -> None:
    with pytest.raises(WorkerDied):
        cell.run(EVERY_PIPE + "while True: each(lambda n: os.write(n, b'x' * 65536))")
    cell.works()


def test_reading_the_pipes_gives_nothing_of_anyone_else(hasty: Cell) -> None:
    with pytest.raises((CodeTimeout, WorkerDied)):
        hasty.run(EVERY_PIPE + "each(lambda n: os.read(n, 10))\nreturn 7")
    hasty.works()


def test_a_reply_forged_with_the_right_number_is_still_only_data(cell: Cell) -> None:
    """The worker belongs to the code that runs in it: it may lie about its result, but not break the parent."""
    forged = """
frame = sys._getframe()
while frame.f_code.co_name != 'main':
    frame = frame.f_back
number, writer = frame.f_locals['number'], frame.f_locals['writer']
writer.write(number + ' ' + a[0] + '\\n')
writer.flush()
os._exit(0)
"""
    assert cell.run(forged, '{"ok": "a lie"}') == "a lie"
    cell.settle()
    shout = json.dumps({"type": "E", "message": "x" * 900_000, "line": 1, "source_line": "", "trace": "y" * 90_000})
    with pytest.raises(CodeError) as caught:
        cell.run(forged, f'{{"error": {shout}}}')
    assert len(str(caught.value)) < 11_000
    cell.settle()
    place = '"message": "", "line": 1, "source_line": "", "trace": ""'
    hostile = [
        *("[]", "{}", '{"ok"', '{"error": 1}', "[" * 100_000, '{"ok": ' + "9" * 5000 + "}"),
        '{"error": {"type": 1, ' + place + "}}",
        '{"error": {"type": "__import__", ' + place + "}}",
        '{"ok": {"$dataclass": "os.stat_result", "fields": {}}}',
        '{"ok": {"$dataclass": [], "fields": 1}}',
        '{"ok": {"$dict": 5}}',
    ]
    for reply in hostile:
        with pytest.raises(CodeError):
            cell.run(forged, reply)
        cell.settle()
        cell.works()


# --- inside the interpreter ------------------------------------------------------------------------------------------


def test_modules_found_through_objects_reach_nothing_more(cell: Cell, tmp_path: Path) -> None:
    """Imports can be got around; what is found that way is still in the same root."""
    (tmp_path / "secret.txt").write_text("the secret")
    source = """
def f(path):
    for cls in object.__subclasses__():
        if cls.__name__ == '_wrap_close':
            return cls.__init__.__globals__['open'](path, 0)
    raise FileNotFoundError(path)
"""
    identity = cell.runner.compile(source, "f")
    with pytest.raises(OSError, match=r"secret\.txt"):
        cell.runner.call(identity, [str(tmp_path / "secret.txt")], {})


def test_kernel_doors_are_shut(cell: Cell) -> None:
    """Through ctypes: new namespaces, mounts, another root, other ids, the host's name."""
    calls = {
        "unshare": [0x10000000], "mount": [None, b"/tmp", b"tmpfs", 0, None], "umount2": [b"/proc", 2],
        "chroot": [b"/tmp"], "pivot_root": [b"/tmp", b"/tmp"], "setns": [0, 0], "sethostname": [b"x", 1],
        "setuid": [0], "setgid": [0], "personality": [0xFFFFFFFF],
    }  # fmt: skip
    for name, arguments in calls.items():
        body = f"return getattr(ctypes.CDLL(None), {name!r})(*{arguments!r})"
        assert cell.run(body) == -1, name
    numbers = (425, 426, 427, 428, 430, 438, 442)  # io_uring, the new mount calls, pidfd_getfd
    assert set(cell.run("return [ctypes.CDLL(None).syscall(n, 0, 0, 0, 0, 0) for n in a[0]]", list(numbers))) == {-1}
    assert cell.run("return [os.getuid(), os.getpid() > 1, os.uname().nodename]") == [1000, True, "sandbox"]


def test_identity_outside_is_not_the_superuser(cell: Cell) -> None:
    pid = cell.runner.pid
    assert pid is not None
    worker = _descendants(pid)[-1]
    status = Path(f"/proc/{worker}/status").read_text(encoding="utf-8")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    ids = int(Path("/proc/self/uid_map").read_text(encoding="utf-8").split()[2])
    if ids > 65534 and isinstance(cell.runner.tier, NamespaceTier) and cell.runner.tier.way == "own":
        assert fields["Uid"].split()[0] != "0"


# --- what honest code can still do -----------------------------------------------------------------------------------


def test_honest_code_has_what_it_needs(cell: Cell) -> None:
    work = """
import asyncio, datetime, decimal, hashlib, random, zoneinfo
async def wait():
    await asyncio.sleep(0.01)
    return 1
with open('note.txt', 'w') as file:
    file.write('kept')
zone = zoneinfo.ZoneInfo('Europe/Berlin') if os.path.exists('/usr/share/zoneinfo/Europe/Berlin') else None
return [asyncio.run(wait()), open('note.txt').read(), hashlib.sha256(b'x').hexdigest()[:4],
        os.getcwd() == os.environ['HOME']]
"""
    uses = [*USES, Used("asyncio", "module", "asyncio")]
    body = "def f():\n" + "".join(f"    {line}\n" for line in work.strip().splitlines())
    assert cell.runner.call(cell.runner.compile(body, "f", uses), (), {}) == [1, "kept", "2d71", True]


def test_candidates_do_not_see_each_others_folder(shared: WorkerRunner) -> None:
    from agentopt.graph import Candidate

    source = "import os\ndef f(name):\n    open(name, 'w').close()\n    return sorted(os.listdir('.'))"
    with RunnerPool(LIMITS, tier=shared.tier) as pool:
        for value in ("a", "b"):
            with Candidate({"v": value}).active():
                identity = pool.compile(source, "f", [Used("os", "module", "os")])
                assert pool.call(identity, (value,), {}) == [value]


def test_killing_the_outer_process_is_a_clear_error_and_the_next_call_restarts(cell: Cell) -> None:
    pid = cell.runner.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    cell.settle()
    cell.works()
