"""The benchmark of exchanges: its rows, from real hosts in the sandbox where that can be made."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("horovod.torch")

from launch import sandbox
from launch.bench import exchange
from launch.bench.exchange_methods import matrices

REASON = sandbox.obstacle()
KEYS = {"hosts", "mbit", "delay_ms", "elements", "method", "median_s", "bytes_per_rank", "predicted_s"}


@pytest.mark.distributed
@pytest.mark.skipif(REASON is not None, reason=f"no sandbox here: {REASON}")
def test_rows_of_two_hosts(tmp_path: Path) -> None:
    path = tmp_path / "exchange.json"
    names = ["fp32", "qoda-allgather", "qoda-reduce-scatter"]
    options = ["--hosts", "2", "--mbit", "200", "--elements", "1000000", "--rounds", "3", "--json", str(path)]
    assert exchange.main([*options, "--methods", ",".join(names)]) == 0
    rows = json.loads(path.read_text())
    assert [row["method"] for row in rows] == names
    for row in rows:
        assert set(row) >= KEYS
        assert row["ranks_identical"]
        # Horovod's negotiation is a visible part of so small a gradient's bytes.
        assert 1.0 < row["bytes_per_rank"] / row["formula_bytes"] < 1.1
        # No faster than the link, and not many times slower even on a busy machine.
        assert 0.8 < row["median_s"] / (row["formula_bytes"] * 8 / 200e6) < 20.0
    assert rows[0]["formula_bytes"] / rows[1]["formula_bytes"] > 6.0
    assert path.with_suffix(".png").exists()


def row(method: str, **fields: Any) -> dict[str, Any]:
    base = {"hosts": 2, "mbit": 100.0, "delay_ms": 0.0, "elements": 10, "ranks_per_host": 1, "method": method}
    return {**base, **fields}


def test_new_rows_replace_old_ones_and_keep_the_order() -> None:
    kept = [row("fp32", median_s=1.0), row("auto", median_s=2.0), row("fp32", mbit=0.0), row("fp32", hosts=4)]
    found = exchange.merged(kept, [row("fp32", median_s=3.0), row("fp16")])
    assert [(r["hosts"], r["mbit"], r["method"]) for r in found] == [
        (2, 100.0, "fp32"),
        (2, 100.0, "fp16"),
        (2, 100.0, "auto"),
        (2, 0.0, "fp32"),
        (4, 100.0, "fp32"),
    ]
    assert found[0]["median_s"] == 3.0


def test_errors_of_the_predictions_are_those_of_all_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = {"bytes_per_rank": 1, "formula_bytes": 1, "median_s": 1.0, "note": "", "oversubscribed": False}
    rows = [row(name, predicted_s=time, **common) for name, time in (("fp32", 1.1), ("fp16", 1.4), ("auto", None))]
    rows.append(row("qoda-allgather", predicted_s=0.85, **common))
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    assert exchange.main(["--show", str(path)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "off by 15% (median of 3), 67% of them within 20%" in told


@pytest.mark.parametrize(("elements", "count", "side"), [(25_000_000, 25, 1000), (2_600_000, 3, 930), (50, 1, 7)])
def test_shapes_for_powersgd(elements: int, count: int, side: int) -> None:
    assert matrices(elements) == [(side, side)] * count


def test_unknown_methods_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        exchange.main(["--methods", "fp64"])
    assert "'fp64': choose from fp32, fp16, powersgd4" in capsys.readouterr().err
