#!/usr/bin/env python3
"""Train a small Llama on text under Hugging Face, its Trainer or accelerate's loop, with compressed gradients.

  deepspeed --num_gpus 2 launch/train/huggingface.py --deepspeed launch/configs/huggingface-zero2.json
  accelerate launch --config_file launch/configs/accelerate.yaml launch/train/huggingface.py --loop accelerate

The model starts from random weights; nothing is downloaded. What makes the "qoda" block of the DeepSpeed configuration
work is the line `import ds_plugin`, and nothing else; `ds_plugin.require(engine)` makes sure of it.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from launch.train.language_model import replicas_identical
from launch.train.options import HelpFormatter, not_negative, positive
from launch.train.summary import write_everywhere
from launch.train.text import VOCABULARY, Text, load_text
from launch.train.torch_processes import exit_status, prepare_processes


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--loop", choices=("trainer", "accelerate"), default="trainer", help="whose training loop")
    parser.add_argument(
        "--deepspeed", type=Path, metavar="PATH", help="DeepSpeed configuration; None: that of accelerate's launcher"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with text files; None: text of scikit-learn's")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of weights and gradients")
    parser.add_argument("--steps", type=positive, default=100, help="optimizer steps")
    parser.add_argument("--batch-size", type=positive, default=8, help="windows per process")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the optimizer")
    parser.add_argument("--width", type=positive, default=128, help="of the Llama")
    parser.add_argument("--layers", type=positive, default=2, help="of the Llama")
    parser.add_argument("--context", type=positive, default=64, help="bytes that it looks back")
    parser.add_argument("--seed", type=not_negative, default=0, help="of weights and batches")
    parser.add_argument("--threads", type=not_negative, default=0, help="per process; 0: the cores shared out")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/huggingface"), help="where the Trainer's files go")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the summary here")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # of DeepSpeed's launcher
    return parser.parse_args(arguments)


def make_model(options: argparse.Namespace) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    width = options.width
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        max_position_embeddings=options.context,
    )
    return LlamaForCausalLM(config)


class Windows(torch.utils.data.Dataset):
    """As many random windows of a text as the training needs; a function of their index and the seed."""

    def __init__(self, text: Text, options: argparse.Namespace, processes: int) -> None:
        self._text, self._options = text, options
        self._length = options.steps * options.batch_size * processes

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self._text.batch(index, 0, 1, self._options.context - 1, self._options.seed)[0]
        return {"input_ids": window, "labels": window}


def train_by_trainer(data: Windows, options: argparse.Namespace) -> tuple[Any, list[float]]:
    """By the Trainer; returns DeepSpeed's engine and the losses."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(options.run_dir),
        deepspeed=None if options.deepspeed is None else str(options.deepspeed),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        logging_steps=max(1, options.steps // 10),
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=options.dtype == "bf16",
    )
    trainer = Trainer(model=make_model(options), args=arguments, train_dataset=data)
    trainer.train()
    return trainer.model_wrapped, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_by_accelerate(data: Windows, options: argparse.Namespace) -> tuple[Any, list[float]]:
    """By a loop of one's own; returns DeepSpeed's engine and the losses of this rank."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, DummyOptim, InitProcessGroupKwargs

    plugin = None if options.deepspeed is None else DeepSpeedPlugin(hf_ds_config=str(options.deepspeed))
    # On CPUs accelerate knows of other processes only if the backend is named.
    handlers = [] if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")]
    precision = "bf16" if options.dtype == "bf16" else "no"
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=handlers, mixed_precision=precision)
    model = make_model(options)
    loader = torch.utils.data.DataLoader(data, batch_size=options.batch_size)
    # DeepSpeed makes the optimizer that its configuration names.
    optimizer: Any = DummyOptim(model.parameters(), lr=options.learning_rate)
    engine, optimizer, batches = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in batches:
        loss = engine(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return engine, losses


def run(options: argparse.Namespace) -> int:
    """The whole run on this rank; returns the process's exit status."""
    prepare_processes(options.threads)
    import ds_plugin  # what makes the "qoda" block work

    data = Windows(load_text(options.data), options, int(os.environ.get("WORLD_SIZE", "1")))
    engine, losses = (train_by_trainer if options.loop == "trainer" else train_by_accelerate)(data, options)
    ds_plugin.require(engine)
    reducer = ds_plugin.reducer_of(engine)
    summary = {
        "loop": options.loop,
        "ranks": torch.distributed.get_world_size(),
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()),
        "steps": reducer.step,
        "losses": losses,
        "gradient_bytes_per_step": reducer.traffic.sent_bytes / reducer.step,
        "layer_types": sorted({entry.layer_type for entry in reducer.registry.parameters.values()}),
        "replicas_identical": replicas_identical(engine),
    }
    if engine.global_rank == 0:
        if options.json is not None:
            write_everywhere((options.json,), summary)
        print(
            f"loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last; {summary['gradient_bytes_per_step']:,.0f} bytes "
            f"of gradients per rank and step for {summary['parameters']:,} parameters",
            flush=True,
        )
    return 0 if summary["replicas_identical"] else 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return exit_status(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
