"""Program for test_checkpoints.py: DeepSpeed alone goes on from a checkpoint, in a process that has no ds_plugin.

Run as `python -m tests.deepspeed.plain_engine CHECKPOINT MEETING`; prints a JSON object.
"""

import json
import logging
import sys

import deepspeed
import torch
from torch import nn

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # minutes of compiling
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


class Small(nn.Module):
    """Something that holds more than one compressed tensor's worth of weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.layers(values).square().mean()


def main(checkpoint: str, meeting: str) -> None:
    """Load it, take a step, and say what was there."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "qoda": {"bits": 5},  # which nobody reads
    }
    model = Small()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config, dist_init_required=False
    )
    _, client_state = engine.load_checkpoint(checkpoint)
    weights = [float(parameter.detach().double().sum()) for parameter in engine.module.parameters()]
    loss = engine(torch.ones(2, 64))
    engine.backward(loss)
    engine.step()
    print(
        json.dumps(
            {
                "weights": weights,
                "steps": engine.global_steps,
                "client_state": sorted(client_state),
                "plug-in": "ds_plugin" in sys.modules,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
