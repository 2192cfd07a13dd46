"""Draw scheduler/trace.json as a Gantt chart. Needs matplotlib (pip install aiosd[plot])."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {
    "queued": "#d0d0d0",
    "preempted": "#f2a65a",
    "swapped": "#c0504d",
    "prefill": "#7fb069",
    "decode": "#3a7ca5",
}
ROWS_MAX = 400


def plot(trace: dict[str, Any], file: Path) -> None:
    """Draw the newest requests, the oldest at the top. The file's suffix gives the format: svg, png, pdf."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    events = trace["traceEvents"]
    titles = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    spans = [e for e in events if e["ph"] == "X"]
    rows = sorted({e["tid"] for e in spans})[-ROWS_MAX:]
    began = min((e["ts"] for e in spans if e["tid"] in rows), default=0)
    figure, axes = pyplot.subplots(figsize=(12, 1.5 + 0.22 * max(4, len(rows))))
    for row, id in enumerate(rows):
        for e in (e for e in spans if e["tid"] == id):
            left, width = (e["ts"] - began) / 1e6, e["dur"] / 1e6
            axes.barh(row, width, left=left, height=0.8, color=COLOURS.get(e["name"], "#000000"))
    axes.set_yticks(range(len(rows)), [titles.get(id, str(id)) for id in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    seen = [name for name in COLOURS if any(e["name"] == name for e in spans)]
    axes.legend(handles=[Patch(color=COLOURS[name], label=name) for name in seen], ncols=6, fontsize=7)
    figure.tight_layout()
    figure.savefig(file)
