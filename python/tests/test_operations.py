"""What docs/operations.md and examples/server say of the store server is what it has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples" / "server"
OPERATIONS = REPOSITORY / "docs" / "operations.md"
COMMAND = Path(sys.executable).parent / "sllm-store"
# What a kind of metric adds to its name when it is scraped.
SUFFIXES = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}


def metrics() -> dict[str, list[str]]:
    """The server's metrics as they are scraped, by their names in the document."""
    source = (REPOSITORY / "crates/server/src/metrics.rs").read_text()
    registered = re.findall(r'register(?:_with_unit)?\("(\w+)", "[^"]*",(?: Unit::(\w+),)? ([^;]*)\);', source)
    found = {}
    for name, unit, value in registered:
        kind = "counter" if "Counter" in value or value in ("self.ended.clone()", "self.bytes.clone()") else "gauge"
        kind = "histogram" if value == "self.seconds.clone()" else kind
        base = "_".join(["sllm", name, *([unit.lower()] if unit else [])])
        scraped = [base + suffix for suffix in SUFFIXES[kind]]
        found[base if kind == "histogram" else scraped[0]] = scraped
    assert len(found) == source.count("registry.register"), "a metric is registered in a way that this test cannot read"
    return found


def expressions(panel: Any) -> list[str]:
    """What a dashboard asks for."""
    if isinstance(panel, dict):
        own = [panel["expr"]] if "expr" in panel else []
        return own + [text for value in panel.values() for text in expressions(value)]
    return [text for value in panel for text in expressions(value)] if isinstance(panel, list) else []


def test_the_dashboard_asks_for_metrics_that_there_are_and_for_all() -> None:
    dashboard = json.loads((EXAMPLES / "grafana.json").read_text())
    asked = set(re.findall(r"\bsllm_\w+", " ".join(expressions(dashboard["panels"]))))
    scraped = metrics().values()
    assert asked <= {name for names in scraped for name in names}
    assert all(asked.intersection(names) for names in scraped), "a metric is in no panel"


def test_the_document_names_every_metric_and_no_other() -> None:
    named = set(re.findall(r"\bsllm_\w+", OPERATIONS.read_text()))
    names = metrics()
    assert set(names) <= named <= {*names, *(name for scraped in names.values() for name in scraped)}


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """The flags of a subcommand."""

    def of(subcommand: str) -> set[str]:
        told = subprocess.run([COMMAND, subcommand, "--help"], check=True, capture_output=True, text=True)
        return set(re.findall(r"--[a-z][a-z-]*", told.stdout))

    return {subcommand: of(subcommand) for subcommand in ("start", "status")}


def arguments(tree: Any) -> list[list[str]]:
    """The command lines of `sllm-store` in a tree of YAML."""
    if isinstance(tree, list):
        words = [word for word in tree if isinstance(word, str)]
        own = [words[words.index("sllm-store") :]] if "sllm-store" in words else []
        return own + [line for value in tree for line in arguments(value)]
    if not isinstance(tree, dict):
        return []
    lines = [line for value in tree.values() for line in arguments(value)]
    # A container's command goes on in another key.
    for first, rest in (("command", "args"), ("entrypoint", "command")):
        if isinstance(tree.get(first), list) and "sllm-store" in tree[first]:
            lines.append([*tree[first], *tree.get(rest, [])])
    return lines


def test_examples_give_the_command_flags_that_it_has(flags: dict[str, set[str]]) -> None:
    lines = []
    for name in ("compose.yaml", "kubernetes.yaml"):
        lines += arguments(list(yaml.safe_load_all((EXAMPLES / name).read_text())))
    service = (EXAMPLES / "sllm-store.service").read_text()
    lines += [line.split() for line in re.findall(r"^ExecStart=\S*/(sllm-store .*)$", service, re.MULTILINE)]
    assert {line[1] for line in lines} == {"start", "status"}
    for _, subcommand, *rest in lines:
        given = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert given <= flags[subcommand], subcommand


@pytest.mark.parametrize("name", ["compose.yaml", "kubernetes.yaml"])
def test_the_examples_leave_the_hosts_namespaces_to_who_needs_them(name: str) -> None:
    text = (EXAMPLES / name).read_text()
    assert not {"hostPID", "hostIPC", "pid", "ipc"} & set(keys(list(yaml.safe_load_all(text))))
    assert re.search(r"^# .*not opened", text, re.MULTILINE), "who needs them is told"


def keys(tree: Any) -> list[str]:
    """The keys of a tree of YAML."""
    if isinstance(tree, list):
        return [key for value in tree for key in keys(value)]
    if not isinstance(tree, dict):
        return []
    return [*tree, *(key for value in tree.values() for key in keys(value))]


@pytest.mark.parametrize("example", ["server", "vllm"])
def test_the_examples_for_kubernetes_are_as_its_schemas_want(example: str) -> None:
    trees = list(yaml.safe_load_all((REPOSITORY / "examples" / example / "kubernetes.yaml").read_text()))
    assert "Deployment" in [tree["kind"] for tree in trees]
    for tree in trees:
        kubernetes_validate.validate(tree, kubernetes_validate.latest_version(), strict=True)
