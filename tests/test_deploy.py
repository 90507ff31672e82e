"""Files for running an owner: every option in them exists, every figure on the dashboard is shown by an owner."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from model_owner.metrics import Metrics
from model_owner.observer import Served, SessionFacts
from model_owner.reload import CHANGEABLE
from model_owner.server import _DRAIN_S
from model_owner.state.schema import METADATA
from splitfl.config import ServeSettings, TuneSettings
from splitfl.options.values import parse_address
from tests.toy import Toy, settings_of

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DEPLOY, GRAFANA = EXAMPLES / "deploy", EXAMPLES / "grafana"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))

pytestmark = pytest.mark.skipif(not DEPLOY.is_dir(), reason="the examples are not part of an installed package")


def read_yaml(path: Path) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(path.read_text(encoding="utf-8")) if each]


def understood(words: list[str], folder: Path, files: dict[str, str]) -> Any:
    """The settings that these words of splitfl mean, where `files` lie in the container at their names."""
    local = []
    for word in words:
        option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
        if value in files:
            copy = folder / Path(value).name
            copy.write_text(files[value], encoding="utf-8")
            value = str(copy)
        local.append(option + equals + value)
    return settings_of(Toy(), local)


def dockerfile(name: str) -> dict[str, list[str]]:
    """Instruction to its arguments, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (DEPLOY / f"{name}.Dockerfile").read_text(encoding="utf-8"))
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            word, _, rest = line.partition(" ")
            found.setdefault(word, []).append(rest.strip())
    return found


MOUNTED = {f"/etc/splitfl/{path.name}": path.read_text(encoding="utf-8") for path in DEPLOY.glob("*.toml")}
"""What lies where in a container."""


@pytest.mark.parametrize(("name", "kind"), [("owner", ServeSettings), ("party", TuneSettings)])
def test_containers(name, kind, tmp_path):
    file = dockerfile(name)
    words = [*json.loads(file["ENTRYPOINT"][-1]), *json.loads(file["CMD"][-1])]
    assert words[0] == "splitfl"
    settings = understood(words[1:], tmp_path, MOUNTED)
    assert isinstance(settings, kind)
    for line in file["COPY"]:
        for source in line.split()[:-1]:
            assert (EXAMPLES.parent / source).exists(), source
    assert file["USER"][-1] == "splitfl", "it runs as root"
    assert len(file["FROM"]) == 1
    if name == "owner":
        assert any(base.startswith("BASE=nvidia/cuda:") for base in file["ARG"])
        assert parse_address(settings.bind)[1] == int(file["EXPOSE"][-1])
        assert settings.metrics_bind in file["HEALTHCHECK"][-1]
    else:
        assert file["FROM"][-1].startswith("python:")
        assert "whl/cpu" in file["RUN"][-1]


def test_extras_that_the_containers_install_exist():
    import tomllib

    extras = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name in ("owner", "party"):
        (wanted,) = re.findall(r"/tmp/source\[([\w,]+)\]", "\n".join(dockerfile(name)["RUN"]))
        assert set(wanted.split(",")) <= set(extras["optional-dependencies"])


def test_compose(tmp_path):
    (compose,) = read_yaml(DEPLOY / "compose.yaml")
    owner, party = compose["services"]["owner"], compose["services"]["party"]
    served = understood(["serve", *owner["command"]], tmp_path, MOUNTED)
    tuned = understood(party["command"], tmp_path, MOUNTED)
    assert served.device == "cuda"
    port = parse_address(served.bind)[1]
    assert owner["ports"] == [f"{port}:{port}"]
    assert parse_address(tuned.owner) == ("owner", port)
    for service in (owner, party):
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.endswith(".toml") or (DEPLOY / source).is_file()
    assert int(owner["stop_grace_period"].rstrip("s")) > 2 * _DRAIN_S
    mounts = [volume.split(":")[1] for volume in owner["volumes"]]
    for path in (served.model, served.kit, served.key, served.parties, served.state):
        assert any(str(path).startswith(mount + "/") for mount in mounts), path


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read(DEPLOY / "splitfl-owner.service", encoding="utf-8")
    return parser


def test_the_unit_of_systemd(tmp_path):
    service = unit()["Service"]
    program, *words = shlex.split(service["ExecStart"])
    assert Path(program).name == "splitfl"
    settings = understood(words, tmp_path, MOUNTED)
    assert str(settings.state).startswith("/var/lib/" + service["StateDirectory"])
    assert shlex.split(service["ExecReload"])[1:] == ["-HUP", "$MAINPID"]
    assert service["KillSignal"] == "SIGTERM"
    assert int(service["TimeoutStopSec"]) > 2 * _DRAIN_S
    assert service["User"] != "root"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path):
    text = (DEPLOY / "splitfl-owner.service").read_text(encoding="utf-8")
    program = shlex.split(unit()["Service"]["ExecStart"])[0]
    copy = tmp_path / "splitfl-owner.service"
    copy.write_text(text.replace(program, sys.executable), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, timeout=60)
    about = [line for line in done.stderr.splitlines() if "splitfl-owner" in line]
    assert about == []


# ---- Kubernetes


def pods():
    """Every pod template, with the labels that select it and the ConfigMaps that are in the same folder."""
    every = [each for path in KUBERNETES for each in read_yaml(path)]
    maps = {each["metadata"]["name"]: each["data"] for each in every if each["kind"] == "ConfigMap"}
    for each in every:
        if "template" in each.get("spec", {}):
            yield each, each["spec"]["template"], maps


def test_manifests_hold_together():
    every = [each for path in KUBERNETES for each in read_yaml(path)]
    assert {each["kind"] for each in every} == {"ConfigMap", "StatefulSet", "Service", "NetworkPolicy", "Job"}
    assert all(each["apiVersion"] and each["metadata"]["name"] for each in every)
    templates = list(pods())
    assert len(templates) == 2
    for workload, template, maps in templates:
        spec = template["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        claims = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", ())}
        for container in (*spec["initContainers"], *spec["containers"]):
            for mount in container["volumeMounts"]:
                assert mount["name"] in {*volumes, *claims}
                source = volumes.get(mount["name"], {}).get("configMap", {}).get("name")
                if source in maps:
                    assert mount["subPath"] in maps[source]
            ports = {port["name"] for port in container.get("ports", ())}
            for name, probe in container.items():
                if name.endswith("Probe"):
                    assert probe["httpGet"]["port"] in ports
                    assert probe["httpGet"]["path"] in ("/healthz", "/metrics")
        assert spec["terminationGracePeriodSeconds"] > 2 * _DRAIN_S
        assert spec["securityContext"]["runAsNonRoot"]
        uid = str(spec["securityContext"]["runAsUser"])
        side = "owner" if workload["kind"] == "StatefulSet" else "party"
        assert f"--uid {uid} " in "\n".join(dockerfile(side)["RUN"])
    labels = [template["metadata"]["labels"] for _, template, _ in templates]
    for each in every:
        selector = {"Service": lambda s: s["selector"], "NetworkPolicy": lambda s: s["podSelector"]["matchLabels"]}
        if each["kind"] in selector:
            assert selector[each["kind"]](each["spec"]) in labels


def test_options_in_the_manifests(tmp_path):
    for workload, template, maps in pods():
        (container,) = template["spec"]["containers"]
        files = {
            mount["mountPath"]: maps[volume["configMap"]["name"]][mount["subPath"]]
            for mount in container["volumeMounts"]
            for volume in template["spec"]["volumes"]
            if volume["name"] == mount["name"] and volume.get("configMap", {}).get("name") in maps
        }
        if workload["kind"] == "StatefulSet":
            settings = understood(["serve", *container["args"]], tmp_path, files)
            numbers = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert parse_address(settings.bind)[1] == numbers["parties"]
            assert settings.metrics_bind.endswith(f":{numbers['metrics']}")
        else:
            shell, flag, script = container["command"]
            assert (shell, flag) == ("sh", "-c")
            words = re.fullmatch(r"exec splitfl (.+?) \$\(\[ -e (\S+) \] && echo (--resume)\)", script)
            for more in ([], [words[3]]):
                settings = understood([*words[1].split(), *more], tmp_path, files)
                assert settings.resume == bool(more)
            assert words[2] == f"{settings.out}/config.toml"
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        for name in ("model", "kit", "key", "parties", "train", "out", "owner_key"):
            path = getattr(settings, name, None)
            assert path is None or any(f"{path}/".startswith(f"{mount}/") for mount in mounts), path


# ---- the dashboard


def shown_by_an_owner() -> dict[str, set[str]]:
    """Every sample that an owner shows, with its labels."""
    from prometheus_client.parser import text_string_to_metric_families

    metrics = Metrics()
    facts = SessionFacts(name="s", party="p", fingerprint="f", protocol="split", wire_dtype="float32")
    metrics.session_opened(facts)
    metrics.session_ended(facts, "closed", 1.0)
    metrics.request_served(
        Served(session="s", party="p", work="forward", tokens=1, bytes_in=1, bytes_out=1, seconds=1.0)
    )
    metrics.refused("busy", None)
    metrics.work_done(1.0, 1.0)
    metrics.batch_done(1, 1, 1)
    from model_owner.metrics import Look

    metrics.look = lambda: Look(spent={"p": 1}, budgets={"p": 2})
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.page().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def check_expression(text: str, known: dict[str, set[str]]) -> None:
    names = re.findall(r"splitfl_\w+", re.sub(r'"[^"]*"', "", text))
    assert names, text
    for name in names:
        assert name in known, f"{name} in {text}"
    allowed = {"job", *(label for name in names for label in known[name])}
    for group in re.findall(r"\bby \(([^)]*)\)", text):
        assert {label.strip() for label in group.split(",")} <= allowed, text
    for matcher in re.findall(r"\{([^}]*)\}", text):
        assert set(re.findall(r"(\w+)=", matcher)) <= allowed, text
    for name in names:
        if name.endswith(("_total", "_bucket", "_count")) or (name.endswith("_sum")):
            assert re.search(r"\b(rate|increase)\(" + name, text), f"{name} only grows: {text}"


def test_every_expression_of_the_dashboard_names_what_an_owner_shows():
    known = shown_by_an_owner()
    board = json.loads((GRAFANA / "dashboard.json").read_text(encoding="utf-8"))
    used = set()
    for panel in board["panels"]:
        assert panel["title"]
        for target in panel["targets"]:
            check_expression(target["expr"], known)
            used |= set(re.findall(r"splitfl_\w+", target["expr"]))
            legend = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert all(re.search(rf"\bby \([^)]*\b{label}\b", target["expr"]) for label in legend)
    for variable in board["templating"]["list"]:
        assert variable["type"] == "datasource" or "splitfl_sessions_open" in variable["query"]
    families = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in known} - {"splitfl_info"}
    assert families == {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in used}, "a figure is not shown"


def test_the_page_about_operation_names_every_figure_and_every_setting_that_may_change():
    text = (EXAMPLES.parent / "docs" / "operation.md").read_text(encoding="utf-8")
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown_by_an_owner()}
    assert set(re.findall(r"`(splitfl_[a-z_]+)`", text)) == families
    (sentence,) = re.findall(r"Of the file these may\s+change: (.*?)\. If it", text, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", sentence)) == CHANGEABLE
    table = re.findall(r"^\| `(\w+)` \|", text.partition("## What can be seen")[0], re.MULTILINE)
    assert set(table) == set(METADATA.tables) - {"splitfl_state"}


def test_no_two_panels_overlap():
    board = json.loads((GRAFANA / "dashboard.json").read_text(encoding="utf-8"))
    taken = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_alerts_and_the_scrape():
    known = shown_by_an_owner()
    (scrape,) = read_yaml(GRAFANA / "prometheus.yml")
    (job,) = scrape["scrape_configs"]
    (served,) = (value for name, value in MOUNTED.items() if name.endswith("serve.toml"))
    assert f'metrics_bind = "{job["static_configs"][0]["targets"][0]}"' in served
    assert scrape["rule_files"] == ["alerts.yml"]
    (alerts,) = read_yaml(GRAFANA / "alerts.yml")
    for rule in alerts["groups"][0]["rules"]:
        assert rule["annotations"]["summary"]
        assert job["job_name"] in rule["expr"]
        if "splitfl_" in re.sub(r'"[^"]*"', "", rule["expr"]):
            check_expression(rule["expr"], known)
