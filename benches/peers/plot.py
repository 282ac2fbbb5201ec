"""Draws OUT.json as OUT.svg and OUT.png: `python benches/peers/plot.py OUT.json`. Needs matplotlib, on any machine."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from table import Group, groups


def draw(data: dict[str, Any], out: str) -> list[str]:
    """One panel a group: a bar a loader, a line from its slowest to its fastest round, and the limit across."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "peers"  # the same file for the same figures
    import matplotlib.pyplot as plt

    shown = [group for group in groups(data) if any(row.rates for row in group.rows.values())]
    if not shown:
        return []
    bars = [sum(bool(row.rates) for row in group.rows.values()) for group in shown]
    heights = [0.32 * n + 0.9 for n in bars]
    figure, axes = plt.subplots(
        len(shown), 1, figsize=(9, sum(heights)), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for group, axis in zip(shown, axes[:, 0]):
        panel(group, axis)
    host = data["host"]
    axes[0, 0].set_title(f"{host['device']}, {host['cpus']} CPUs\n{shown[0].title}", fontsize=9)
    figure.tight_layout()
    files = [f"{out}.svg", f"{out}.png"]
    figure.savefig(files[0], metadata={"Date": None})
    figure.savefig(files[1], dpi=120)
    plt.close(figure)
    return files


def panel(group: Group, axis: Any) -> None:
    rows = sorted((row for row in group.rows.values() if row.rates), key=lambda row: row.median)
    colours = ["#1f6f8b" if row.title.startswith("ours") else "#b8b8b8" for row in rows]
    axis.barh([row.title for row in rows], [row.median for row in rows], color=colours)
    for place, row in enumerate(rows):
        axis.plot([min(row.rates), max(row.rates)], [place, place], color="black", linewidth=1)
        axis.annotate(f" {row.median:.2f}", (max(row.rates), place), va="center", fontsize=7)
    limit = group.limit()
    if limit:
        label = f"limit {limit[0]:.2f}: {limit[1]}"
        axis.axvline(limit[0], color="#c0392b", linestyle="--", linewidth=1.2, label=label)
        axis.legend(loc="lower right", fontsize=6)
    axis.set_title(group.title, fontsize=9)
    axis.set_xlabel("GB/s", fontsize=7)
    axis.tick_params(labelsize=7)
    axis.margins(x=0.12)


def main() -> None:
    if len(sys.argv) != 2 or not sys.argv[1].endswith(".json"):
        raise SystemExit("usage: plot.py OUT.json")
    with open(sys.argv[1]) as f:
        data = json.load(f)
    for file in draw(data, os.path.splitext(sys.argv[1])[0]):
        print(file)


if __name__ == "__main__":
    main()
