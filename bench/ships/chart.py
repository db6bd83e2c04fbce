"""The Helm chart: linted, rendered, objects checked against Kubernetes' schemas and compared with a golden file."""

import tempfile
from pathlib import Path

import yaml

from bench.rig.install import NotInstalled
from bench.ships.tools import Checklist, ToolFailed, kubernetes_tool, python_tool, run, system_tool
from tests.data import CHECKOUT

HELM = CHECKOUT / "deploy" / "helm"
CHART, EVERYTHING, GOLDEN = HELM / "embedmesh", HELM / "everything.values.yaml", HELM / "everything.golden.yaml"
KUBERNETES = "1.33"
FOREIGN = "monitoring.coreos.com/"  # of operators: Kubernetes has no schema of these
MISTAKES = ("gateway.settings.in_flight=1", "node.replicas=-1", "secret.store=mysql://x", "gatway.replicas=2")


def write_golden() -> None:
    """What the chart renders with everything on. Raises NotInstalled."""
    helm = kubernetes_tool("helm")
    GOLDEN.write_text(run([helm, "template", "embedmesh", CHART, "--values", EVERYTHING]))


def check_chart(rows: Checklist) -> None:
    """All of it."""
    try:
        helm = kubernetes_tool("helm")
    except NotInstalled as why:
        rows.skip("the chart is right", why)
        return
    rows.check("helm lint", "0 chart(s) failed" in run([helm, "lint", "--strict", CHART, "--values", EVERYTHING]))
    default = run([helm, "template", "embedmesh", CHART])
    everything = run([helm, "template", "embedmesh", CHART, "--values", EVERYTHING])
    rows.check("the golden file is what the chart renders", GOLDEN.read_text() == everything)
    for mistake in MISTAKES:
        try:
            run([helm, "template", "embedmesh", CHART, "--set", mistake])
            rows.check(f"--set {mistake} is refused", False)
        except ToolFailed as said:
            rows.check(f"--set {mistake} is refused", "values don't meet" in str(said) or "schema" in str(said), said)
    for name, rendered in (("default", default), ("everything", everything)):
        _check_schemas(rows, name, rendered)
    _check_rule(rows, everything)


def _check_schemas(rows: Checklist, name: str, rendered: str) -> None:
    objects = [each for each in yaml.safe_load_all(rendered) if each]
    ours = [each for each in objects if not each["apiVersion"].startswith(FOREIGN)]
    promise = f"{name}: {len(ours)} of {len(objects)} objects fit Kubernetes {KUBERNETES}"
    try:
        validate = python_tool("kubernetes-validate")
    except NotInstalled as why:
        rows.skip(promise, why)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "objects.yaml"
        file.write_text(yaml.safe_dump_all(ours))
        try:
            run([validate, "--strict", "--kubernetes-version", KUBERNETES, file])
            rows.check(promise, True, ", ".join(sorted({each["kind"] for each in ours})))
        except ToolFailed as said:
            rows.check(promise, False, said)


def _check_rule(rows: Checklist, rendered: str) -> None:
    """The rules, and what compose gives Prometheus, by Prometheus' own tool."""
    try:
        promtool = system_tool("promtool", "prometheus")
    except NotInstalled as why:
        rows.skip("promtool takes the rules and the configuration", why)
        return
    for rule in (each for each in yaml.safe_load_all(rendered) if each and each["kind"] == "PrometheusRule"):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rules.yaml"
            file.write_text(yaml.safe_dump(rule["spec"]))
            name = rule["metadata"]["name"]
            rows.check(f"promtool takes the rules {name}", "SUCCESS" in run([promtool, "check", "rules", file]))
    config = CHECKOUT / "deploy" / "compose" / "prometheus.yaml"
    said = run([promtool, "check", "config", "--syntax-only", config])
    rows.check("promtool takes compose's configuration", "SUCCESS" in said, said)
