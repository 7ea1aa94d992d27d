#!/usr/bin/env python3
"""Train a small Transformer on text under DeepSpeed, any ZeRO stage, with or without compressed gradients.

  deepspeed --num_gpus 2 launch/train/language_model.py --zero 2 --bits 5
  torchrun --nproc-per-node 2 launch/train/language_model.py --zero 2 --bits 5

The DeepSpeed configuration is launch/configs/zero<stage>.json, over which options on the command line go, or the one
given by --config (with --bits 32: without its "qoda" block). What makes its "qoda" block work is the line
`import ds_plugin`, and nothing else. Records go to the run directory: steps.jsonl, summary.json, and with
--checkpoint-every checkpoints, from which --resume goes on exactly.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from launch.train.data import DataError
from launch.train.job import STEPS_FILE, SUMMARY_FILE
from launch.train.options import (
    CODEBOOK_OPTIONS,
    HelpFormatter,
    add_codebook_options,
    codebook_settings,
    not_negative,
    positive,
    steps_list,
)
from launch.train.summary import write_everywhere
from launch.train.text import Text, load_text
from launch.train.torch_processes import exit_status, prepare_processes
from launch.train.transformer import Transformer

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
_NONE = 32
_OF_CONFIGURATION = (
    "zero",
    "dtype",
    *CODEBOOK_OPTIONS,
    "update_levels_at",
    "batch_size",
    "accumulate",
    "learning_rate",
)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with text files; None: text of scikit-learn's")
    parser.add_argument("--config", type=Path, metavar="PATH", help="DeepSpeed configuration; None: that of the stage")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=2, help="ZeRO stage")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of weights and gradients")
    add_codebook_options(parser.add_argument_group("compression of gradients (--bits 32: DeepSpeed's own path)"))
    parser.add_argument(
        "--update-levels-at", type=steps_list, default=(20, 200), metavar="STEPS", help="steps, separated by commas"
    )
    parser.add_argument("--steps", type=positive, default=200, help="optimizer steps")
    parser.add_argument("--batch-size", type=positive, default=8, help="windows per process and micro-batch")
    parser.add_argument("--accumulate", type=positive, default=1, help="micro-batches per step")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the configuration's optimizer")
    parser.add_argument("--width", type=positive, default=128, help="of the Transformer")
    parser.add_argument("--layers", type=positive, default=2, help="of the Transformer")
    parser.add_argument("--heads", type=positive, default=4, help="of its attention")
    parser.add_argument("--context", type=positive, default=64, help="bytes that it looks back")
    parser.add_argument("--seed", type=not_negative, default=0, help="of weights and batches")
    parser.add_argument("--threads", type=not_negative, default=0, help="per process; 0: the cores shared out")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/language_model"), help="where records go")
    parser.add_argument("--checkpoint-every", type=not_negative, default=0, metavar="N", help="steps; 0: never")
    parser.add_argument("--resume", action="store_true", help="go on from the run directory's last checkpoint")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the summary here too")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # of DeepSpeed's launcher
    options = parser.parse_args(arguments)
    if options.config is not None:
        _refuse_beside_config(parser, options)
    return options


def _refuse_beside_config(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a message where an option would change what the given configuration says."""
    given = {name for name in _OF_CONFIGURATION if getattr(options, name) != parser.get_default(name)}
    if options.bits == _NONE:
        given.discard("bits")
    if given:
        named = ", ".join(sorted("--" + name.replace("_", "-") for name in given))
        parser.error(f"{named}: with --config that is said by the file")


def ds_configuration(options: argparse.Namespace) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: the file, and the options over it.

    Raises:
        ConfigError: if there is no such file, or it is not a JSON object.
    """
    from ds_plugin.config import read_file

    path = options.config or CONFIGS / f"zero{options.zero}.json"
    values = read_file(path)
    if options.config is None:
        values["optimizer"]["params"]["lr"] = options.learning_rate
        values["qoda"] |= codebook_settings(options)
        values["qoda"]["update_levels"]["at"] = list(options.update_levels_at)
        values["train_micro_batch_size_per_gpu"] = options.batch_size
        values["gradient_accumulation_steps"] = options.accumulate
        if options.dtype != "fp32":
            values[options.dtype] = {"enabled": True}
    if options.bits == _NONE:
        values.pop("qoda", None)
    return values


def train(engine: Any, text: Text, options: argparse.Namespace, telemetry: Any) -> float:
    """All steps that are left; returns the mean loss of the last ten on this rank."""
    losses: list[float] = []
    micro_batches = engine.gradient_accumulation_steps()
    size = engine.train_micro_batch_size_per_gpu()
    while engine.global_steps < options.steps:
        for micro in range(micro_batches):
            number = engine.global_steps * micro_batches + micro
            windows = text.batch(number, engine.global_rank, size, options.context, options.seed)
            loss = engine(windows.to(engine.device))
            engine.backward(loss)
            engine.step()
        losses.append(loss.item())
        telemetry.log(step=engine.global_steps, loss=losses[-1])
        if options.checkpoint_every and engine.global_steps % options.checkpoint_every == 0:
            client_state = {"telemetry": telemetry.state_dict()}
            engine.save_checkpoint(str(options.run_dir / "checkpoints"), client_state=client_state)
    return sum(losses[-10:]) / max(1, len(losses[-10:]))


def weights_of(engine: Any) -> torch.Tensor:
    """All weights as bytes, gathered where ZeRO 3 has parted them; a collective call."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        parts = [p.detach().cpu().contiguous().view(torch.uint8).flatten() for p in engine.module.parameters()]
        return torch.cat(parts)


def replicas_identical(engine: Any) -> bool:
    """Whether all ranks hold the same bits; a collective call."""
    import hashlib

    digest = hashlib.blake2b(weights_of(engine).numpy().tobytes(), digest_size=16).digest()
    ours = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(engine.device)
    all_ranks = [torch.empty_like(ours) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(all_ranks, ours)
    return all(torch.equal(other, ours) for other in all_ranks)


def evaluate(engine: Any, windows: torch.Tensor) -> float:
    """Mean loss of the held-out text; every rank computes the same."""
    engine.eval()
    with torch.no_grad():
        loss = float(engine(windows.to(engine.device)))
    engine.train()
    return loss


def run(options: argparse.Namespace) -> int:
    """The whole run on this rank; returns the process's exit status."""
    prepare_processes(options.threads)
    import deepspeed

    import ds_plugin
    from hvd_qoda.sinks import JsonLinesSink
    from hvd_qoda.telemetry import Telemetry

    deepspeed.init_distributed(verbose=False)
    text = load_text(options.data)
    torch.manual_seed(options.seed)
    model = Transformer(options.width, options.layers, options.heads, options.context)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    configuration = ds_configuration(options)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=configuration)
    first = engine.global_rank == 0
    if first:
        options.run_dir.mkdir(parents=True, exist_ok=True)
    telemetry = Telemetry([JsonLinesSink(options.run_dir / STEPS_FILE)], rank=engine.global_rank, config=configuration)
    compressed = "qoda" in configuration and torch.distributed.get_world_size() > 1
    if compressed:
        ds_plugin.add_telemetry(engine, telemetry)
    if options.resume:
        path, client_state = engine.load_checkpoint(str(options.run_dir / "checkpoints"))
        if path is None:
            raise DataError(f"{options.run_dir} holds no checkpoint to go on from")
        telemetry.load_state_dict(client_state["telemetry"])
    started_at = engine.global_steps
    train_loss = train(engine, text, options, telemetry)
    summary = {
        "command": shlex.join(sys.argv),
        "text": text.name,
        "parameters": parameters,
        "ranks": torch.distributed.get_world_size(),
        "configuration": configuration,
        "started_at_step": started_at,
        "steps": engine.global_steps,
        "train_loss": train_loss,
        "test_loss": evaluate(engine, text.test_windows(options.context)),
        "replicas_identical": replicas_identical(engine),
        "gradient_bytes_per_step": None,
    }
    if compressed:
        traffic = ds_plugin.reducer_of(engine).traffic
        summary["gradient_bytes_per_step"] = traffic.sent_bytes / max(1, engine.global_steps - started_at)
        summary["bits"] = {key: book.bits for key, book in ds_plugin.reducer_of(engine).registry.codebooks.items()}
    engine.destroy()
    telemetry.close()
    if first:
        write_everywhere((options.run_dir / SUMMARY_FILE, options.json), summary)
        print(
            f"training loss {summary['train_loss']:.4f}, held-out loss {summary['test_loss']:.4f}, "
            f"summary in {options.run_dir / SUMMARY_FILE}",
            flush=True,
        )
    return 0 if summary["replicas_identical"] else 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return exit_status(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
