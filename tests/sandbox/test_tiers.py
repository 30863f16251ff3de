"""Which tier runs changed code: never a weaker one than asked for, and none that was not tried."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentopt import graph, sandbox
from agentopt.errors import UserError
from agentopt.graph import CodeTimeout, Used, WorkerDied
from agentopt.sandbox import (
    ContainerTier,
    Limits,
    NamespaceTier,
    ProcessTier,
    RunnerPool,
    SandboxUnavailable,
    Started,
    Tier,
    WorkerRunner,
    register_tier,
    resolve_tier,
    sandboxed,
    start_command,
    tier_names,
    worker_command,
)
from agentopt.sandbox import tier as tier_named
from agentopt.sandbox._layout import Layout, interpreter_layout, resolve_paths
from agentopt.sandbox._namespace import _folder


class Pretended:
    """A tier that works or not as told, and starts plain processes."""

    def __init__(self, name: str, strength: int, reason: str | None = None) -> None:
        self.name = name
        self.strength = strength
        self.reason = reason
        self.started = 0

    def available(self) -> str | None:
        return self.reason

    def start(self, limits: Limits) -> Started:
        self.started += 1
        return ProcessTier().start(limits)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test may register what it likes."""
    from agentopt.sandbox import _tiers

    monkeypatch.delenv("AGENTOPT_SANDBOX", raising=False)
    monkeypatch.setattr(_tiers, "_registry", dict(_tiers._registry))
    monkeypatch.setattr(_tiers, "_made", dict(_tiers._made))
    yield


def pretend(**tiers: tuple[int, str | None]) -> dict[str, Pretended]:
    made = {name: Pretended(name, strength, reason) for name, (strength, reason) in tiers.items()}
    for name, one in made.items():
        register_tier(name, lambda one=one: one)
    return made


def call_once(pool: RunnerPool) -> object:
    return pool.call(pool.compile("def f(): return 1", "f"), (), {})


# --- the rule --------------------------------------------------------------------------------------------------------


def test_auto_takes_the_weakest_tier_that_holds() -> None:
    made = pretend(namespace=(20, None), container=(30, None))
    assert resolve_tier("auto") is made["namespace"]
    made["namespace"].reason = "not today"
    assert resolve_tier() is made["container"]


def test_auto_refuses_generated_code_when_only_processes_work() -> None:
    made = pretend(namespace=(20, "user namespaces are off"), container=(30, "no engine"), process=(10, None))
    with pytest.raises(SandboxUnavailable) as caught, RunnerPool() as pool:
        call_once(pool)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "namespace: user namespaces are off; container: no engine" in message
    assert "--sandbox process" in message
    assert "\n" not in message
    assert made["process"].started == 0


@pytest.mark.parametrize("wanted", ["namespace", "container", "cloud"])
def test_a_tier_asked_for_by_name_is_never_replaced(wanted: str) -> None:
    made = pretend(process=(10, None), namespace=(20, None), container=(30, None), cloud=(40, None))
    made[wanted].reason = "it is broken"
    with pytest.raises(SandboxUnavailable, match=f"the {wanted} tier does not work here: it is broken"):
        resolve_tier(wanted)
    with RunnerPool(tier=wanted) as pool, pytest.raises(SandboxUnavailable):
        call_once(pool)
    assert [one.started for one in made.values()] == [0, 0, 0, 0]


def test_process_tier_runs_generated_code_only_when_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    made = pretend(process=(10, None), namespace=(20, "no"), container=(30, "no"))
    with RunnerPool(tier="process") as pool:
        assert call_once(pool) == 1
    monkeypatch.setenv("AGENTOPT_SANDBOX", "process")
    with RunnerPool() as pool:
        assert call_once(pool) == 1
        assert pool.tier is made["process"]
    with pytest.raises(SandboxUnavailable):
        resolve_tier("auto")  # said aloud, "auto" is not what the variable says


def test_unknown_names_are_one_sentence_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"found tier 'vm'; expected one of auto, process, .*namespace"):
        RunnerPool(tier="vm").compile("def f(): pass", "f")
    with pytest.raises(UserError, match="'auto'"):
        register_tier("auto", ProcessTier)


def test_a_plug_in_is_found_by_name_made_once_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = pretend(cloud=(40, None))["cloud"]
    assert isinstance(cloud, Tier)
    assert "cloud" in tier_names()
    with RunnerPool(tier="cloud") as pool:
        assert call_once(pool) == call_once(pool) == 1
    assert cloud.started == 1
    assert tier_named("cloud") is cloud


def test_shipped_tiers_are_tiers_in_order_of_strength() -> None:
    tiers: list[Tier] = [ProcessTier(), NamespaceTier(), ContainerTier()]
    assert [one.name for one in tiers] == ["process", "namespace", "container"]
    assert sorted(tiers, key=lambda one: one.strength) == tiers
    assert all(isinstance(one, Tier) for one in tiers)


def test_a_tier_that_holds_nothing_back_does_not_pass_as_one() -> None:
    """The probe is a real worker that tries; a plain process is caught."""
    from agentopt.sandbox._probe import probe

    reason = probe(ProcessTier())
    assert reason is not None
    assert "it reads files outside its folder" in reason
    assert "it uses the network" in reason


def test_probe_says_why_a_worker_does_not_start() -> None:
    from agentopt.sandbox._probe import probe
    from agentopt.sandbox._tiers import start_command

    class Broken(Pretended):
        def start(self, limits: Limits) -> Started:
            code = "import sys; sys.exit('unshare: Operation not permitted')"
            return start_command([sys.executable, "-c", code], environment={}, folder="/tmp")

    assert probe(Broken("broken", 20)) == "unshare: Operation not permitted"

    class Missing(Pretended):
        def start(self, limits: Limits) -> Started:
            return start_command(["/nonexistent/command"], environment={}, folder="/tmp")

    assert "No such file or directory" in str(probe(Missing("missing", 20)))


# --- blocks and runs -------------------------------------------------------------------------------------------------


def test_block_refuses_at_once_when_code_will_run_for_sure() -> None:
    pretend(namespace=(20, "off"), container=(30, "off"))
    with pytest.raises(SandboxUnavailable), sandboxed("auto", needed=True):
        raise AssertionError("entered")
    with sandboxed("auto") as runner:
        assert isinstance(runner, RunnerPool)  # nothing was tried: no code has run


def test_block_leaves_a_runner_that_the_user_chose() -> None:
    pretend(namespace=(20, "off"), container=(30, "off"))
    with RunnerPool(tier="process") as mine, graph.use_code_runner(mine):
        with sandboxed("auto", needed=True) as runner:
            assert runner is mine
        with sandboxed("process") as runner:
            assert runner is not mine


def test_tune_refuses_before_anything_is_run_when_it_would_write_code(tmp_path: Path) -> None:
    import agentopt as ao
    from agentopt.search import Budget, TuneOptions

    pretend(namespace=(20, "off"), container=(30, "off"))
    calls: list[str] = []

    @ao.bundle(trainable=True)
    def shout(text: str) -> str:
        calls.append(text)
        return text

    @ao.agent
    def answer(text: str) -> str:
        return str(shout(text))

    rows = [{"text": f"t{number}", "expected": f"T{number}"} for number in range(40)]
    with pytest.raises(SandboxUnavailable, match="generated code is not run") as caught:
        ao.tune(
            answer,
            train=rows,
            metric="exact_match",
            optimizer="optoprime",
            budget=Budget(rollouts=200),
            options=TuneOptions(tune=("*",), capture=False),
            store=tmp_path / "s.db",
        )
    assert caught.value.exit_code == 2
    assert calls == []


def test_evaluating_changed_code_without_a_sandbox_ends_with_the_one_sentence() -> None:
    import agentopt as ao

    pretend(namespace=(20, "off"), container=(30, "off"))

    @ao.bundle(trainable=True)
    def loud(text: str) -> str:
        return text

    @ao.agent
    def reply(text: str) -> str:
        return str(loud(text))

    from agentopt.evaluation import load_program

    (spec,) = [spec for spec in load_program(reply).parameters.values() if spec.kind == "code"]
    changed = ao.Candidate({spec.name: "def loud(text: str) -> str:\n    return text.upper()"})
    with sandboxed("auto"), pytest.raises(SandboxUnavailable, match="generated code is not run"):
        ao.evaluate(reply, [{"text": "a", "expected": "A"}], "exact_match", candidate=changed, store=":memory:",
                    capture=False)  # fmt: skip


def test_options_and_settings_know_the_tier() -> None:
    from agentopt.cli._settings import Settings
    from agentopt.search import TuneOptions

    assert TuneOptions().sandbox == Settings().sandbox == "auto"
    assert TuneOptions(sandbox="process").to_dict()["sandbox"] == "process"
    assert "sandbox" not in TuneOptions.deciding()
    with pytest.raises(UserError, match="found tier 'vm'"):
        TuneOptions(sandbox="vm")


def test_doctor_says_which_tiers_hold_and_why_others_do_not() -> None:
    from agentopt.cli._doctor import _sandboxes

    pretend(namespace=(20, "user namespaces are off"), container=(30, None), process=(10, None), cloud=(40, "no key"))
    found = {check.name: (check.status, check.detail) for check in _sandboxes()}
    assert found["sandbox namespace"] == ("optional", "user namespaces are off")
    assert found["sandbox cloud"] == ("optional", "no key")
    assert found["sandbox container"] == ("ok", "tried, holds; generated code runs here by default")
    assert found["sandbox process"][0] == "ok"
    assert "--sandbox process" in found["sandbox process"][1]


# --- containers, with a stand-in for the engine ----------------------------------------------------------------------

FAKE = """#!{python}
import json, os, sys
log = {log!r}
with open(log, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "version":
    sys.exit({version})
if sys.argv[1:3] == ["image", "inspect"]:
    sys.exit(0 if sys.argv[3] == {image!r} else "no such image")
pids = os.path.join({folder!r}, "pid-")
if sys.argv[1] == "rm":
    try:
        with open(pids + sys.argv[3]) as file:
            os.kill(int(file.read()), 9)
    except OSError:
        sys.exit("no such container")
    sys.exit(0)
with open(pids + sys.argv[sys.argv.index("--name") + 1], "w") as file:
    file.write(str(os.getpid()))
at = sys.argv.index({image!r})
os.chdir({folder!r})
os.execv(sys.executable, [sys.executable, *sys.argv[at + 2:]])
"""
IMAGE = "python-for-tests"


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A `docker` on PATH that runs the command of `docker run` as a plain process and keeps a log."""
    yield fake_engine(tmp_path, monkeypatch)


def fake_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str = "0") -> Path:
    folder, log = tmp_path / "bin", tmp_path / "log"
    folder.mkdir()
    script = folder / "docker"
    text = FAKE.format(python=sys.executable, log=str(log), image=IMAGE, folder=str(tmp_path), version=version)
    script.write_text(text, encoding="utf-8")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.defpath}")
    return log


def test_container_runs_the_worker_shut_in_and_removes_it(engine: Path) -> None:
    tier = ContainerTier(IMAGE)
    with WorkerRunner(Limits(seconds=20.0, folder_bytes=1 << 20), tier=tier) as runner:
        identity = runner.compile("def f(x):\n    print('to nobody')\n    return x + 1", "f")
        assert [runner.call(identity, (n,), {}) for n in range(3)] == [1, 2, 3]
    lines = engine.read_text(encoding="utf-8").splitlines()
    import json

    run, remove = (json.loads(line) for line in lines)
    words = " ".join(run[: run.index(IMAGE)])
    for needed in ("run --rm -i", "--network none", "--read-only", "--cap-drop ALL", "--pids-limit", "--memory ",
                   "--security-opt no-new-privileges", "--user 65534:65534", "--pull never",
                   "--tmpfs /tmp:rw,noexec,nosuid,nodev,size=1048576"):  # fmt: skip
        assert needed in words
    name = run[run.index("--name") + 1]
    assert remove == ["rm", "--force", name]
    assert not [word for word in run if word in ("-v", "--volume", "--mount", "--privileged")]


def test_container_call_that_hangs_is_killed_and_the_next_one_works(engine: Path) -> None:
    with WorkerRunner(Limits(seconds=1.0), tier=ContainerTier(IMAGE)) as runner:
        good = runner.compile("def f(): return 1", "f")
        with pytest.raises(CodeTimeout):
            runner.call(runner.compile("def g():\n    while True: pass", "g"), (), {})
        assert runner.call(good, (), {}) == 1
        with pytest.raises(WorkerDied, match="exit code 3"):
            runner.call(runner.compile("def h(): os._exit(3)", "h", [Used("os", "module", "os")]), (), {})
        assert runner.call(good, (), {}) == 1
    assert engine.read_text(encoding="utf-8").count('"rm"') == 3


def test_container_tier_is_tried_not_trusted(engine: Path) -> None:
    """This engine isolates nothing, and is found out."""
    reason = ContainerTier(IMAGE).available()
    assert reason is not None
    assert "a worker was tried and it reads files outside its folder" in reason


def test_container_tier_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ContainerTier(IMAGE).available() == "neither docker nor podman is installed"
    with pytest.raises(WorkerDied, match="could not be started: neither docker nor podman"):
        WorkerRunner(tier=ContainerTier(IMAGE)).compile("def f(): pass", "f")
    fake_engine(tmp_path, monkeypatch)
    assert ContainerTier("other").available() == "the image other is not there: docker pull other"
    monkeypatch.setenv("AGENTOPT_SANDBOX_IMAGE", "mine")
    assert ContainerTier().image == "mine"


def test_container_tier_of_an_engine_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_engine(tmp_path, monkeypatch, version='"Cannot connect to the daemon"')
    assert ContainerTier(IMAGE).available() == "docker does not answer: Cannot connect to the daemon"


# --- the namespace tier's root ---------------------------------------------------------------------------------------


def test_links_on_the_way_are_made_anew_and_nested_folders_bound_once(tmp_path: Path) -> None:
    (tmp_path / "usr" / "lib" / "python").mkdir(parents=True)
    (tmp_path / "usr" / "bin").mkdir()
    (tmp_path / "lib").symlink_to("usr/lib")
    (tmp_path / "usr" / "bin" / "python").write_text("")
    (tmp_path / "usr" / "bin" / "py").symlink_to("python")
    (tmp_path / "env").symlink_to(tmp_path / "usr" / "bin" / ".." / "lib")
    root = str(tmp_path)
    wanted = [f"{root}/lib/python", f"{root}/lib", f"{root}/usr/bin/py", f"{root}/env"]
    layout = resolve_paths(wanted)
    assert layout.binds == [f"{root}/usr/bin/python", f"{root}/usr/lib"]
    assert dict(layout.links) == {
        f"{root}/lib": "usr/lib", f"{root}/usr/bin/py": "python", f"{root}/env": f"{root}/usr/bin/../lib",
    }  # fmt: skip


def test_layout_shows_the_interpreter_and_neither_home_nor_project() -> None:
    layout = interpreter_layout()
    assert os.path.realpath(sys.executable) in layout.binds or any(
        os.path.realpath(sys.executable).startswith(f"{bind}/") for bind in layout.binds
    )
    hidden = {str(Path.home()), str(Path.cwd()), "/", "/etc", "/home", "/root", "/var", "/tmp"}
    assert hidden.isdisjoint(layout.binds)


def test_namespace_tier_prefers_what_limits_processes_and_says_why_nothing_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "feature of Linux" in str(NamespaceTier().available())
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    assert NamespaceTier("bwrap").available() == "bwrap is not installed"


def test_public_names_exist() -> None:
    assert all(hasattr(sandbox, name) for name in sandbox.__all__)


def test_a_worker_runs_from_its_source_alone_as_a_far_tier_would_start_it(tmp_path: Path) -> None:
    class Shell(Pretended):
        """What ssh does: one line for a shell elsewhere."""

        def start(self, limits: Limits) -> Started:
            line = " ".join(worker_command(sys.executable, quote=True))
            environment = {"PATH": os.defpath, "HOME": str(tmp_path)}
            return start_command(["/bin/sh", "-c", line], environment=environment, folder=str(tmp_path))

    with WorkerRunner(tier=Shell("shell", 30)) as runner:
        assert runner.call(runner.compile("def f(x): return [x, 'é']", "f"), ("ü",), {}) == ["ü", "é"]


@pytest.mark.parametrize(
    ("binds", "links", "folder"),
    [
        (["/usr/lib", "/opt/env/lib"], [("/lib", "usr/lib")], "/tmp"),
        (["/usr/lib", "/tmp/project/.venv/lib"], [], "/scratch"),
        (["/usr/lib"], [("/tmp/project/.venv/bin/python", "/usr/bin/python3")], "/scratch"),
        (["/tmpfiles/lib"], [], "/tmp"),
    ],
)
def test_an_environment_below_tmp_is_not_covered_by_the_workers_folder(
    binds: list[str], links: list[tuple[str, str]], folder: str
) -> None:
    assert _folder(Layout(binds, links)) == folder
