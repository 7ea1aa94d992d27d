#!/usr/bin/env python3
"""Bytes on the wire per step under DeepSpeed, its own gradients against compressed ones, and the loss at the end.

Trains the Transformer of launch/train/language_model.py on this machine, over gloo, for every ZeRO stage, dtype, number
of processes and method. Bytes are those of the network interface (TCP/IP headers and acknowledgements included), read
in a network namespace of its own where the user may make one (`unshare`); else on the shared loopback interface, where
nothing else must run meanwhile. Figures are per process and step.

What is not gradients (ZeRO's all-gathers of parameters, norms) is measured too, in a run whose gradients are not sent:
gradient_bytes_per_step is the difference.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.own_network import UNSHARE, bring_loopback_up, loopback_bytes, may_make_a_network
from launch.train.options import HelpFormatter, not_negative, positive

_ROOT = Path(__file__).resolve().parents[2]
_RESULTS = Path(__file__).resolve().parents[1] / "results" / "deepspeed.json"
_INSIDE = "HVD_QODA_OWN_NETWORK"
_WARM_UP, _MEASURED = 12, 8  # levels are fitted in the warm-up
_SEED_OF_FLOOR = -1


@dataclass(frozen=True)
class Case:
    """One run: `bits` None is DeepSpeed's own path, 0 a run that sends no gradients."""

    stage: int
    dtype: str
    bits: int | None
    seed: int

    @property
    def method(self) -> str:
        return "deepspeed" if self.bits is None else f"qoda-{self.bits}bit"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--processes", type=positive, nargs="+", default=[2, 4], help="numbers of processes")
    parser.add_argument("--stages", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3], help="ZeRO stages")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="of the gradients"
    )
    parser.add_argument("--bits", type=int, choices=range(2, 9), default=5, help="of the compressed runs")
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="runs of each kind")
    parser.add_argument("--seed", type=not_negative, default=0, help="the first of the seeds; the others follow it")
    parser.add_argument("--steps", type=positive, default=60, help=f"of each run, at least {_WARM_UP + _MEASURED}")
    parser.add_argument("--width", type=positive, default=128, help="of the Transformer")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS", help="for each number of processes")
    parser.add_argument("--json", type=Path, metavar="PATH", help="records; None: launch/results/deepspeed.json")
    parser.add_argument("--add", action="store_true", help="keep the file's records of other cases")
    parser.add_argument("--worker", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.steps < _WARM_UP + _MEASURED:
        parser.error(f"--steps must be at least {_WARM_UP + _MEASURED}")
    return options


def cases_of(options: argparse.Namespace) -> Iterator[Case]:
    for stage in options.stages:
        for dtype in options.dtypes:
            yield Case(stage, dtype, 0, _SEED_OF_FLOOR)
            for seed in range(options.seed, options.seed + options.seeds):
                yield Case(stage, dtype, None, seed)
                yield Case(stage, dtype, options.bits, seed)


def configuration(case: Case) -> dict[str, Any]:
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}},
        "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 1000},
    }
    if case.dtype == "bf16":
        values["bf16"] = {"enabled": True}
    if case.bits is not None:
        levels = {"at": [8], "every": None, "samples": 4}
        values["qoda"] = {"bits": case.bits or 8, "update_levels": levels, "measure_error_every": 0}
    return values


def run_case(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """One training, on this rank."""
    import deepspeed
    import torch

    import ds_plugin
    from launch.train.language_model import replicas_identical
    from launch.train.text import load_text
    from launch.train.transformer import Transformer

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    text = load_text(None)
    torch.manual_seed(max(case.seed, 0))
    model = Transformer(options.width, layers=2, heads=4, context=64)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=configuration(case), dist_init_required=False
    )
    if case.bits == 0:
        reducer = ds_plugin.reducer_of(engine)
        reducer.reduce = lambda *arguments: None  # type: ignore[method-assign]  # nothing but the gradients is sent
        reducer.end_step = lambda: None  # type: ignore[method-assign]
    losses: list[float] = []
    begin = end = 0
    steps = options.steps if case.bits != 0 else _WARM_UP + _MEASURED
    for step in range(steps):
        if step in (_WARM_UP, _WARM_UP + _MEASURED):
            torch.distributed.barrier()
            begin, end = end, loopback_bytes()
            torch.distributed.barrier()
        windows = text.batch(step, rank, engine.train_micro_batch_size_per_gpu(), 64, max(case.seed, 0))
        loss = engine(windows)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    if steps == _WARM_UP + _MEASURED:
        torch.distributed.barrier()
        begin, end = end, loopback_bytes()
    mean = torch.tensor(sum(losses[-10:]) / 10)
    torch.distributed.all_reduce(mean)
    identical = replicas_identical(engine)
    engine.destroy()
    return {
        "stage": case.stage,
        "dtype": case.dtype,
        "processes": size,
        "method": case.method,
        "wire_bytes_per_step": round((end - begin) / _MEASURED / size),
        "final_loss": float(mean) / size,
        "replicas_identical": identical,
        "seed": case.seed,
        "steps": steps,
    }


def work(options: argparse.Namespace) -> None:
    """All cases, on one rank; the first one writes what it has found."""
    import logging

    import deepspeed
    import torch

    from launch.train.torch_processes import end_processes

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # minutes of compiling
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    meeting = f"file://{options.worker}/meeting"
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    with (options.worker / f"records{rank}").open("w") as file:
        for case in cases_of(options):
            file.write(json.dumps(run_case(case, options)) + "\n")
            file.flush()
    end_processes()


def records_of(size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all cases with this number of processes."""
    with tempfile.TemporaryDirectory() as folder:
        own = [sys.executable, "-m", "launch.bench.deepspeed_bytes", *sys.argv[1:], "--worker", folder]
        path = os.pathsep.join([str(_ROOT), str(_ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]).rstrip(":")
        common = {
            **os.environ,
            "PYTHONPATH": path,
            "WORLD_SIZE": str(size),
            "LOCAL_SIZE": str(size),
            "LOCAL_RANK": "0",
            "DS_ACCELERATOR": "cpu",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        logs = [Path(folder, f"log{rank}") for rank in range(size)]
        ranks = []
        for rank, log in enumerate(logs):
            with log.open("wb") as output:
                environment = {**common, "RANK": str(rank)}
                ranks.append(subprocess.Popen(own, env=environment, cwd=_ROOT, stdout=output, stderr=output))
        try:
            for rank in ranks:
                rank.wait(options.timeout)
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                    rank.wait()
        if any(rank.returncode for rank in ranks):
            ends = "\n".join(log.read_text(errors="replace")[-2000:] for log in logs)
            raise SystemExit(f"a process ended with an error:\n{ends}")
        return [json.loads(line) for line in Path(folder, "records0").read_text().splitlines()]


def without_floor(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of training runs, with the bytes of gradients alone."""
    floors = {
        (record["stage"], record["dtype"], record["processes"]): record["wire_bytes_per_step"]
        for record in records
        if record["seed"] == _SEED_OF_FLOOR
    }
    found = []
    for record in records:
        if record["seed"] != _SEED_OF_FLOOR:
            floor = floors[record["stage"], record["dtype"], record["processes"]]
            wire = record["wire_bytes_per_step"]
            found.append({**record, "gradient_bytes_per_step": wire - floor, "other_bytes_per_step": floor})
    return found


def _identity(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[key] for key in ("stage", "dtype", "processes", "method", "seed"))


def show(records: Sequence[dict[str, Any]]) -> None:
    """One line per record, with the ratio to DeepSpeed's own."""
    own = {_identity(record): record for record in records}
    for record in records:
        base = own.get(_identity({**record, "method": "deepspeed"}))
        ratio = ""
        if base is not None and base is not record:
            ratio = f"  gradients 1/{base['gradient_bytes_per_step'] / record['gradient_bytes_per_step']:.2f}"
        print(
            f"ZeRO {record['stage']} {record['dtype']} x{record['processes']} seed {record['seed']} "
            f"{record['method']:12} gradients {record['gradient_bytes_per_step']:>9,} wire "
            f"{record['wire_bytes_per_step']:>9,} loss {record['final_loss']:.4f} "
            f"{'' if record['replicas_identical'] else 'REPLICAS DIFFER'}{ratio}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.worker is not None:
        work(options)
        return 0
    if os.environ.get(_INSIDE) is None and may_make_a_network():
        own = [*UNSHARE, sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
        return subprocess.run(own, env={**os.environ, _INSIDE: "1"}, check=False).returncode
    if os.environ.get(_INSIDE) is not None:
        bring_loopback_up()
    command = f"launch/bench/deepspeed_bytes.py {shlex.join(sys.argv[1:])}".strip()
    records = []
    for size in options.processes:
        found = without_floor(records_of(size, options))
        records += [{**record, "parameters_width": options.width, "command": command} for record in found]
    path = options.json or _RESULTS
    if options.add and path.is_file():
        new = {_identity(record) for record in records}
        kept = json.loads(path.read_text())
        records = [record for record in kept if _identity(record) not in new] + records
    records.sort(key=_identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1) + "\n")
    show(records)
    return 0 if all(record["replicas_identical"] for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
