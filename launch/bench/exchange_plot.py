"""The plot of `exchange.py`: how many times faster than Horovod fp32, by link rate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NO_LIMIT = "no limit"


def draw_speedups(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw one panel for every size, number of hosts and delay.

    Args:
        rows: of `exchange.py`; those of panels without fp32 are left out.
        path: of the image.
    """
    panels: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["elements"], row["hosts"], row["ranks_per_host"], row["delay_ms"], row["oversubscribed"])
        panels.setdefault(key, []).append(row)
    panels = {key: found for key, found in panels.items() if any(row["method"] == "fp32" for row in found)}
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.0), squeeze=False, sharey=True)
    for axis, ((elements, hosts, local, delay, crowded), found) in zip(axes[0], panels.items(), strict=True):
        rates = sorted({row["mbit"] for row in found}, key=lambda rate: rate or float("inf"))
        plain = {row["mbit"]: row["median_s"] for row in found if row["method"] == "fp32"}
        for method in dict.fromkeys(row["method"] for row in found):
            own = {row["mbit"]: row["median_s"] for row in found if row["method"] == method}
            places = [place for place, rate in enumerate(rates) if rate in own and rate in plain]
            axis.plot(places, [plain[rates[p]] / own[rates[p]] for p in places], marker="o", label=method)
        axis.set_xticks(range(len(rates)), [f"{rate:g}" if rate else NO_LIMIT for rate in rates])
        axis.set_xlabel("Mbit/s of each link")
        title = f"{elements / 1e6:g}M values, {hosts} hosts" + (f" x {local} ranks" if local > 1 else "")
        axis.set_title(title + (f", {delay:g} ms" if delay else "") + ("\n(oversubscribed)" if crowded else ""))
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("times as fast as Horovod fp32")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
