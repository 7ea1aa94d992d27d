"""Training steps between hosts: the replay of a backward pass, shares and speed-ups, and the program on real hosts."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("horovod.torch")

from hvd_qoda.fusion import overlapping_bytes
from launch import sandbox
from launch.bench import end_to_end
from launch.bench.replay import NETWORKS, Replay, record

REASON = sandbox.obstacle()
KEYS = {"hosts", "mbit", "delay_ms", "elements", "method", "median_s", "bytes_per_rank", "predicted_s"}


@pytest.mark.timed
def test_a_replay_releases_real_gradients_in_their_order_and_time() -> None:
    model = NETWORKS["wgan"].build(0)
    recordings = record(model)
    assert set(recordings) == {name for name, _ in model.named_parameters()}
    assert sum(4 * r.gradient.numel() for r in recordings.values()) == pytest.approx(10.4e6, rel=0.01)
    parts = [recording.part for recording in recordings.values()]
    assert parts == sorted(parts)
    assert 0 < parts[0] < parts[-1] <= 1
    kept = {name: recording.gradient.clone() for name, recording in recordings.items()}
    came: dict[str, float] = {}

    def note(name: str) -> Callable[[torch.Tensor], None]:
        return lambda _: came.update({name: time.perf_counter()})

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(note(name))
    replay = Replay(model, recordings, forward_s=0.01, backward_s=0.3)
    begin = time.perf_counter()
    loss = replay.forward()
    assert time.perf_counter() - begin >= 0.01
    replay.backward(loss)
    assert time.perf_counter() - replay.began >= 0.3
    assert sorted(came, key=lambda name: came[name]) == list(recordings)
    for name, recording in recordings.items():
        assert came[name] - replay.began >= 0.3 * recording.part
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, kept[name])


def test_buffers_are_small_enough_to_overlap_with_backward() -> None:
    assert overlapping_bytes(10.4e6, 16 * 2**20, "allgather") == 2.6e6
    assert overlapping_bytes(10.4e6, 16 * 2**20, "reduce_scatter") == 5.2e6
    assert overlapping_bytes(1e6, 16 * 2**20, "allgather") == 2**21
    assert overlapping_bytes(1e9, 16 * 2**20, "reduce_scatter") == 16 * 2**20
    assert overlapping_bytes(1e9, 1000, "off") == 1000


def test_communication_is_what_fp32_adds_to_a_step() -> None:
    rows = [{"method": name, "median_s": seconds} for name, seconds in (("alone", 0.1), ("fp32", 0.4), ("auto", 0.16))]
    fp32, auto = end_to_end.with_shares(rows)
    assert fp32["communication_share"] == auto["communication_share"] == pytest.approx(0.75)
    assert auto["speedup"] == pytest.approx(2.5)
    assert auto["alone_s"] == 0.1


@pytest.mark.distributed
@pytest.mark.skipif(REASON is not None, reason=f"no sandbox here: {REASON}")
def test_rows_of_two_hosts(tmp_path: Path) -> None:
    path = tmp_path / "end_to_end.json"
    options = ["--networks", "wgan", "--hosts", "2", "--mbit", "500", "--steps", "2", "--json", str(path)]
    assert end_to_end.main([*options, "--methods", "fp32,qoda-allgather"]) == 0
    rows = json.loads(path.read_text())
    assert [row["method"] for row in rows] == ["fp32", "qoda-allgather"]
    for row in rows:
        assert set(row) >= KEYS
        assert row["compute"] == "replay"
        assert "RTX 3090" in row["computed_by"]
        assert row["median_s"] >= 0.02
    assert rows[0]["bytes_per_rank"] > 5 * rows[1]["bytes_per_rank"]
    assert path.with_suffix(".png").exists()
