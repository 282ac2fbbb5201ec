"""Medians of the results, the limit that each group of them stands against, and the Markdown table."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from inputs import GB
from loaders import LOADERS


@dataclass
class Row:
    """One loader or limit in one state."""

    title: str
    rates: list[float] = field(default_factory=list)
    wrong: int | None = None
    tensors: int = 0
    device_extra: int | None = None
    pinned: int | None = None
    version: str | None = None
    why_not: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


@dataclass
class Group:
    """One model in one state on some CPUs: what is comparable."""

    model: str
    state: str
    cpus: str | None
    size: int = 0
    tensors: int = 0
    rows: dict[str, Row] = field(default_factory=dict)
    limits: dict[str, Row] = field(default_factory=dict)

    @property
    def title(self) -> str:
        on = f", CPUs {self.cpus}" if self.cpus else ""
        return f"{self.model} ({self.size / GB:.2f} GB, {self.tensors:,} tensors), {self.state}{on}"

    def limit(self) -> tuple[float, str] | None:
        """GB/s that nothing can pass, and what it is."""
        taken = {name: row.median for name, row in self.limits.items() if row.rates}
        peaks = [taken[name] for name in ("copy to fresh memory", "copy peak") if name in taken]
        floors = {name: rate for name, rate in taken.items() if name.startswith("floor")}
        best = max(floors, key=lambda name: floors[name]) if floors else None
        if self.state == "warm":
            if not peaks:
                return None
            which = "a copy to fresh memory" if "copy to fresh memory" in taken else "one pinned copy of 1 GiB"
            return peaks[0], which
        if best is None:
            return None
        if self.state == "cold":
            return floors[best], f"the best raw read ({best})"
        seconds = 0.5 / floors[best]  # the uncached half; the cached one moves meanwhile
        if peaks:
            seconds = max(seconds, 1 / peaks[0])
        return 1 / seconds, f"half of the bytes at the best raw read ({best}), the other half meanwhile"


def groups(data: dict[str, Any]) -> list[Group]:
    """The results, grouped, in the order in which they were first measured."""
    found: dict[tuple[Any, ...], Group] = {}
    for run in data["runs"]:
        key = (run["model"], run["state"], run["cpus"])
        group = found.setdefault(key, Group(*key))
        limit = run["name"] not in LOADERS
        rows = group.limits if limit else group.rows
        row = rows.setdefault(run["name"], Row(run["name"] if limit else LOADERS[run["name"]].title))
        if "seconds" not in run:
            row.why_not = run.get("skipped") or run.get("failed") or "it did not run"
            continue
        row.rates.append(run["bytes"] / run["seconds"] / GB)
        row.wrong = run.get("wrong", row.wrong)
        row.version = run.get("version")
        if not limit:
            row.tensors = run["tensors"]
            row.device_extra = run.get("device_extra")
            row.pinned = run.get("report", {}).get("pinned_bytes")
            group.size, group.tensors = max(group.size, run["bytes"]), max(group.tensors, run["tensors"])
    verified = {}
    for group in found.values():
        for name, row in group.rows.items():
            if row.wrong is not None:
                verified[group.model, name] = row.wrong
    for group in found.values():
        for name, row in group.rows.items():
            row.wrong = verified.get((group.model, name), row.wrong)
    return list(found.values())


def markdown(data: dict[str, Any]) -> str:
    """All groups as tables."""
    host, versions = data["host"], data["versions"]
    lines = [
        f"{host['device']}; {host['cpus']} CPUs ({host['cpu']}), {host['memory_GiB']} GiB, {host['system']}; "
        f"torch {versions['torch']}, serverless_llm {versions['serverless_llm']}.",
        "",
        "GB/s, medians and each round. Each figure is a fresh process, from open to device-synchronised, in turn.",
    ]
    for group in groups(data):
        lines += ["", f"### {group.title}", ""]
        limit = group.limit()
        lines += [f"Limit: {limit[1]}, {limit[0]:.2f} GB/s." if limit else "No limit was taken.", ""]
        lines += ["| loader | GB/s | each round | of the limit | bits | beside the weights |"]
        lines += ["|---|---|---|---|---|---|"]
        order = sorted(group.rows.values(), key=lambda row: -row.median if row.rates else 0)
        for row in order:
            if not row.rates:
                continue
            each = " ".join(f"{rate:.2f}" for rate in row.rates)
            part = f"{row.median / limit[0]:.2f}" if limit else ""
            bits = "not compared" if row.wrong is None else f"{row.wrong} tensors wrong" if row.wrong else "equal"
            name = row.title if row.title.startswith("ours") else f"{row.title} {row.version or ''}".strip()
            if row.tensors != group.tensors:
                bits += f"; {row.tensors} tensors"
            beside = [] if row.device_extra is None else [f"{row.device_extra / 1e6:.0f} MB of device memory"]
            beside += [] if row.pinned is None else [f"{row.pinned / 1e6:.0f} MB pinned while it loads"]
            lines.append(f"| {name} | **{row.median:.2f}** | {each} | {part} | {bits} | {'; '.join(beside)} |")
        for row in filter(lambda row: row.rates, group.limits.values()):
            each = " ".join(f"{rate:.2f}" for rate in row.rates)
            lines.append(f"| *limit: {row.title}* | {row.median:.2f} | {each} | | | |")
        missing = [f"{row.title}: {row.why_not}" for row in [*order, *group.limits.values()] if not row.rates]
        if missing:
            lines += ["", "Not measured: " + "; ".join(missing) + "."]
    return "\n".join(lines) + "\n"
