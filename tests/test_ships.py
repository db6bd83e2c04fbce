"""What ships beside the package fits it: settings that exist, one version, probes and deadlines that agree with ours.

`make ships` builds, renders and starts it all; here files are read.
"""

import ast
import json
import re
import runpy
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from embedmesh.commands.group import COMMANDS
from embedmesh.gateway.api.table import APIS
from embedmesh.gateway.main import GATEWAY_DRAIN_S
from embedmesh.node.joining import FAREWELL_S
from embedmesh.node.main import NODE_DRAIN_S
from embedmesh.process import EXIT_SETUP
from embedmesh.rules.limits import KEEP_ALIVE_S, REQUEST_MAX_S, WRITE_REPLY_S
from embedmesh.rules.ports import EMBED_SCOPE
from embedmesh.settings import ENV_PREFIX, GatewaySettings, NodeSettings
from embedmesh.supervisor import STOP_GATEWAY_S, STOP_NODE_S
from tests.data import CHECKOUT
from tests.gateway.test_metrics_page import FLEET, GATEWAY, NODE, PROCESS

DEPLOY = CHECKOUT / "deploy"
CHART = DEPLOY / "helm" / "embedmesh"
VERSION = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"]
OTHER_VARIABLES = {
    "ASSETS_DIR",
    "CONFIG",
    "MODELS_DIR",
    "IMAGE",
    "SITE",
    "GATEWAYS",
}  # of provision/, of compose and Caddy
CHART_SETS = {"host", "port", "data_dir", "store", "catalogue", "nodes", "workers"}
CHART_SETS |= {"tls_cert", "tls_key", "tls_client_ca"}  # not yet: its probes and services speak plain HTTP
STUCK_S = 180.0  # that a process may answer nothing before it is ended: slow is not stuck


def texts() -> list[Path]:
    return sorted(path for path in DEPLOY.rglob("*") if path.is_file())


def names(settings: type[msgspec.Struct]) -> set[str]:
    return {field.name for field in msgspec.structs.fields(settings)}


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)(s|m|)", text).groups()  # type: ignore[union-attr]
    return float(number) * (60 if unit == "m" else 1)


@pytest.mark.parametrize("file", texts(), ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_setting_that_is_named_exists_and_yaml_is_whole(file: Path) -> None:
    text = file.read_text()
    known = {name.upper() for name in names(GatewaySettings) | names(NodeSettings)} | OTHER_VARIABLES
    assert set(re.findall(rf"\b{ENV_PREFIX}([A-Z_]*[A-Z])\b", text)) <= known
    if file.suffix == ".yaml" and "templates" not in file.parts:
        assert all(each is not None for each in yaml.safe_load_all(text))


def test_there_is_one_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert {chart["version"], chart["appVersion"]} == {VERSION}
    assert re.findall(r"^ARG VERSION=(.+)$", (DEPLOY / "Containerfile").read_text(), re.M) == [VERSION]
    for file in DEPLOY.glob("compose*.yaml"):
        tags = set(re.findall(r"EMBEDMESH_IMAGE:-embedmesh:([\w.]+)\}", file.read_text()))
        assert tags == {VERSION}, file.name


def test_the_chart_takes_every_setting_that_it_does_not_decide_itself() -> None:
    """A setting that comes must come here, too; a mistyped one is refused by helm."""
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]
    takes = {room: set(schema[room]["properties"]["settings"]["propertyNames"]["enum"]) for room in ("gateway", "node")}
    hidden = {"listen_fd", "lifeline_fd", "metrics_file"}
    assert takes["gateway"] == names(GatewaySettings) - CHART_SETS - hidden
    assert takes["node"] <= names(NodeSettings)


# -- containers --------------------------------------------------------------------------------------------------------


def test_a_container_is_given_the_time_that_a_drain_takes() -> None:
    for file in ("compose.yaml", "compose.cluster.yaml"):
        for name, service in yaml.safe_load((DEPLOY / file).read_text())["services"].items():
            if service.get("image", "").startswith("${EMBEDMESH_IMAGE"):
                assert seconds(service["stop_grace_period"]) >= STOP_GATEWAY_S + STOP_NODE_S, (file, name)
                assert service["read_only"] and service["cap_drop"] == ["ALL"], (file, name)


def test_the_image_has_every_program_that_is_called_in_it() -> None:
    """It has no more of a system than deploy/closure.py names: what a chart or a compose file calls has to be there."""
    programs = set(runpy.run_path(str(DEPLOY / "closure.py"), run_name="closure")["PROGRAMS"])
    called = {"python3", "embedmesh"}
    for container in (each for pod in pods().values() for each in [*pod["containers"], *pod.get("initContainers", [])]):
        stop = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sh"])
        called |= {stop[0], container.get("command", ["sh"])[0].rpartition("/")[2]}
    text = "".join(file.read_text() for file in DEPLOY.glob("compose*.yaml"))
    called |= {name.rpartition("/")[2] for name in re.findall(r"entrypoint: \[([\w/]+)", text)}
    called |= set(re.findall(r"\$\$\((\w+)", text))
    assert {"sh", "cat", "sleep"} <= called
    assert called - {"python3", "embedmesh"} <= programs


def test_the_image_builds_without_extras() -> None:
    """deploy/prune.sh imports every module: of what the image lacks it must know that it is an extra."""
    lock = (CHECKOUT / "requirements" / "install.lock").read_text()
    has = {"embedmesh", *re.findall(r"^([\w.-]+)==", lock, re.M)}
    lacks = {
        name
        for name, packages in packages_distributions().items()
        if not has & {re.sub(r"[-_.]+", "-", each).lower() for each in packages}
    }
    script = (DEPLOY / "prune.sh").read_text()
    skipped, extras = (ast.literal_eval(each) for each in re.findall(r"^(?:SKIPPED|EXTRAS) = (.*)$", script, re.M))
    for module in (CHECKOUT / "embedmesh").rglob("*.py"):
        name = ".".join(module.relative_to(CHECKOUT).with_suffix("").parts)
        if name not in skipped:
            nodes = ast.parse(module.read_text()).body
            wanted = {each.module or "" for each in nodes if isinstance(each, ast.ImportFrom) and not each.level}
            wanted |= {alias.name for each in nodes if isinstance(each, ast.Import) for alias in each.names}
            assert {each.partition(".")[0] for each in wanted} & lacks <= extras, name


# -- Kubernetes --------------------------------------------------------------------------------------------------------


def rendered() -> list[dict[str, Any]]:
    """What helm makes of the chart with everything on; `make ships` compares it with the chart."""
    return [each for each in yaml.safe_load_all((DEPLOY / "helm" / "everything.golden.yaml").read_text()) if each]


def of_kind(kind: str) -> Iterator[dict[str, Any]]:
    yield from (each for each in rendered() if each["kind"] == kind)


def pods() -> dict[str, dict[str, Any]]:
    """Pod specs by component."""
    found = [*of_kind("Deployment"), *of_kind("StatefulSet")]
    return {
        each["metadata"]["labels"]["app.kubernetes.io/component"]: each["spec"]["template"]["spec"] for each in found
    }


@pytest.mark.parametrize("component", ["gateway", "node"])
def test_a_pod_is_locked_down_and_gets_no_variables_from_services(component: str) -> None:
    """A Service named `embedmesh` would set EMBEDMESH_PORT, which is a setting."""
    pod = pods()[component]
    assert pod["enableServiceLinks"] is pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"]
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        assert container["image"].endswith(f":{VERSION}")
        limits = container["securityContext"]
        assert limits["readOnlyRootFilesystem"] and not limits["allowPrivilegeEscalation"]
        assert limits["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("component", ["gateway", "node"])
def test_liveness_ends_what_is_stuck_and_readiness_only_takes_traffic_away(component: str) -> None:
    (container,) = pods()[component]["containers"]
    live, ready, start = (container[f"{name}Probe"] for name in ("liveness", "readiness", "startup"))
    assert live["httpGet"]["path"] == start["httpGet"]["path"] == "/health"
    assert ready["httpGet"]["path"] == "/readyz"
    assert live["periodSeconds"] * live["failureThreshold"] >= STUCK_S
    assert live["timeoutSeconds"] >= 15
    assert ready["periodSeconds"] * ready["failureThreshold"] < STUCK_S / 2


def test_a_pod_is_given_the_time_that_a_drain_takes() -> None:
    gateway, node = pods()["gateway"], pods()["node"]
    wait_s = float(gateway["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert wait_s >= 5 and gateway["terminationGracePeriodSeconds"] >= wait_s + GATEWAY_DRAIN_S + 5
    assert node["terminationGracePeriodSeconds"] >= NODE_DRAIN_S + FAREWELL_S + 5


def test_nodes_reach_gateways_that_are_not_ready_yet() -> None:
    """A gateway is ready once a node has embedded for it: by a Service of ready pods none would ever come to it."""
    (join,) = (each for each in of_kind("Service") if each["metadata"]["name"].endswith("-join"))
    assert join["spec"]["publishNotReadyAddresses"] and join["spec"]["clusterIP"] == "None"
    (node,) = pods()["node"]["containers"]
    assert f"http://{join['metadata']['name']}:8080" in node["command"][2]


def test_nodes_speak_to_gateways_and_nobody_else() -> None:
    (policy,) = (each["spec"] for each in of_kind("NetworkPolicy") if each["metadata"]["name"].endswith("-node"))
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    dns, gateways = policy["egress"]
    assert {each["port"] for each in dns["ports"]} == {53}
    (peer,) = gateways["to"]
    assert peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "gateway"


# -- watching ----------------------------------------------------------------------------------------------------------

DASHBOARD = json.loads((DEPLOY / "grafana" / "embedmesh.json").read_text())
RULES, ALERTS = (yaml.safe_load((DEPLOY / "prometheus" / f"{name}.yaml").read_text()) for name in ("rules", "alerts"))
OF_PROMETHEUS = {"le", "job", "instance"}  # labels that no process of ours writes


def named_rules(rules: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    return {rule[kind]: rule for group in rules["groups"] for rule in group["rules"] if kind in rule}


def queries() -> dict[str, str]:
    """All that Prometheus is asked, by where."""
    panels = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    }
    rules = named_rules(RULES, "record") | named_rules(ALERTS, "alert")
    return panels | {name: rule["expr"] for name, rule in rules.items()}


@pytest.mark.parametrize("where", queries())
def test_what_is_asked_of_prometheus_is_shown_by_somebody(where: str) -> None:
    rows = {row.name: row for row in [*GATEWAY, *FLEET, *NODE, *PROCESS]}
    for name, matchers in re.findall(r"\b((?:embedmesh|process)_[a-z_]+)(?:{(.*?)})?", queries()[where]):
        if name in named_rules(RULES, "record"):
            continue
        row = rows.get(name) or rows[re.sub(r"_(bucket|sum|count)\Z", "", name)]
        assert row.name == name or row.kind == "histogram"
        assert set(re.findall(r'(\w+)(?:=~|!=|=)"', matchers)) <= {*row.labels, *OF_PROMETHEUS}, name


def test_rules_and_dashboard_count_what_callers_ask_models_for_in_whatever_words() -> None:
    rows = [row for api in APIS for row in api.ROUTES]
    paid = {row.path for row in rows if row.raw is not None and row.raw.key_checked_by_flow}
    embeds = {row.path for row in rows if row.path in paid and row.scope == (EMBED_SCOPE,)}
    plain = {path for path in embeds if not path.startswith("/v1/confidential/") and not path.endswith("/rerank")}
    reranks = {path for path in embeds if path.endswith("/rerank")}
    of = {"embedmesh:requests_failed:": paid, "Embeddings and rerank, p99 B": reranks}
    found = [
        (where, {row.path for row in rows if re.fullmatch(pattern, row.path)})
        for where, query in queries().items()
        for pattern in re.findall(r'route=~"(/[^"]*)"', query)
    ]
    assert len(found) == 15
    for where, paths in found:
        assert paths == next((paths for name, paths in of.items() if where.startswith(name)), plain), where


def test_every_alert_says_what_to_do_and_is_seen_to_fire() -> None:
    alerts = named_rules(ALERTS, "alert")
    page = (CHECKOUT / "docs" / "how-to" / "alerts.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n\n\*\*(Page|Ticket)\.\*\*", page, re.M))
    assert sections == {name: rule["labels"]["severity"].title() for name, rule in alerts.items()}
    for part in re.split(r"^## ", page, flags=re.M)[1:]:
        assert "*Look*" in part and "*Do*" in part, part
    for name, rule in alerts.items():
        assert rule["annotations"]["runbook"] == f"docs/how-to/alerts.md#{name.lower()}"
    tried = re.findall(r'alertname="(\w+)"', (DEPLOY / "prometheus" / "alerts.test.yaml").read_text())
    assert set(tried) == set(alerts)


def test_the_dashboard_is_whole() -> None:
    """Panels do not lie upon each other; there is one source, which who imports it chooses."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        taken = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not taken & places and max(x for x, _ in taken) < 24, panel["title"]
        places |= taken
        assert panel["type"] == "row" or (panel["datasource"]["uid"] == "${source}" and panel["targets"])


def test_chart_and_compose_bring_the_same_files() -> None:
    specs = {each["metadata"]["name"]: each["spec"] for each in of_kind("PrometheusRule")}
    assert specs == {"embedmesh": RULES, "embedmesh-alerts": ALERTS}
    (board,) = (each for each in of_kind("ConfigMap") if each["metadata"]["name"].endswith("-dashboard"))
    assert json.loads(board["data"]["embedmesh.json"]) == DASHBOARD
    services = yaml.safe_load((DEPLOY / "compose.cluster.yaml").read_text())["services"]
    mounts = dict(
        str(each).split(":")[:2] for each in services["prometheus"]["volumes"] + services["grafana"]["volumes"]
    )
    config = yaml.safe_load((DEPLOY / "compose" / "prometheus.yaml").read_text())
    within = Path(mounts["./prometheus"]).relative_to("/etc/prometheus")
    assert config["rule_files"] == [f"{within}/rules.yaml", f"{within}/alerts.yaml"]
    (provider,) = yaml.safe_load((DEPLOY / "compose" / "grafana-dashboards.yaml").read_text())["providers"]
    assert provider["options"]["path"] == mounts["./grafana"]


# -- systemd -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "drain_s"),
    [
        ("embedmesh", STOP_GATEWAY_S + STOP_NODE_S),
        ("embedmesh-gateway", GATEWAY_DRAIN_S),
        ("embedmesh-node", NODE_DRAIN_S + FAREWELL_S),
    ],
)
def test_a_unit_runs_a_command_of_ours_and_waits_for_its_drain(unit: str, drain_s: float) -> None:
    lines = (DEPLOY / "systemd" / f"{unit}.service").read_text().splitlines()
    said = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    assert said["ExecStart"].split()[1] in COMMANDS
    assert float(said["TimeoutStopSec"]) > drain_s
    assert said["RestartPreventExitStatus"] == str(EXIT_SETUP)
    assert said["DynamicUser"] == said["NoNewPrivileges"] == "yes" and said["ProtectSystem"] == "strict"


# -- proxies -----------------------------------------------------------------------------------------------------------

PROXIES = {
    "nginx.conf": {
        "longest": r"proxy_read_timeout (\w+);",
        "idle": r"keepalive_timeout (\w+);",
        "sending": r"\bsend_timeout (\w+);",
        "needs": (
            "proxy_buffering off;",
            "proxy_request_buffering off;",
            "client_max_body_size 0;",
            "gzip off;",
            "merge_slashes off;",
        ),
    },
    "Caddyfile": {
        "longest": r"response_header_timeout (\w+)",
        "idle": r"keepalive (\w+)",
        "needs": ("No flush_interval", "compression off"),
    },
    "envoy.yaml": {
        "longest": r"stream_idle_timeout: (\w+)",
        "idle": r"idle_timeout: (\w+) #.*first",
        "needs": ("timeout: 0s", "request_timeout: 0s", "upgrade_type: embedmesh-node", "normalize_path: false"),
    },
}


@pytest.mark.parametrize("file", PROXIES)
def test_a_proxy_leaves_deadlines_and_bounds_to_the_gateway(file: str) -> None:
    """It waits longer than the longest request, and lets go of idle connections before the gateway closes them."""
    text, wants = (DEPLOY / "proxies" / file).read_text(), PROXIES[file]
    found = {name: re.search(str(pattern), text) for name, pattern in wants.items() if name != "needs"}
    assert all(found.values()), found
    times = {name: seconds(match[1]) for name, match in found.items() if match}
    assert times["longest"] > REQUEST_MAX_S and times["idle"] < KEEP_ALIVE_S
    assert times.get("sending", WRITE_REPLY_S + 1) > WRITE_REPLY_S
    assert [each for each in wants["needs"] if each not in text] == []
