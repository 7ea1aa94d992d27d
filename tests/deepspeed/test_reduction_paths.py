"""Every way on which DeepSpeed reduces gradients: with 8 bits a few steps of SGD move the weights as without."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.deepspeed.training import Model, configuration, relative_difference, run, weights
from tests.launcher import RankPool

# Plain SGD: unlike Adam's, its steps show a gradient that is too large by a factor. DeepSpeed clips at 1.0 by default.
SGD = {
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}

PATHS: dict[str, dict[str, Any]] = {
    "stage 0, several buckets of fp32 and predivide": {"stage": 0, "gradient_predivide_factor": 2.0},
    "stage 0, prescaled": {"stage": 0, "prescale_gradients": True},
    "stage 0, sum": {"stage": 0, "gradient_allreduce_op": "sum", "gradient_clipping": 0.5},
    "stage 0, bf16 with fp32 communication": {"stage": 0, "dtype": "bf16", "communication_data_type": "fp32"},
    "stage 0, clipping": {"stage": 0, "gradient_clipping": 0.1},
    "stage 0, accumulation": {"stage": 0, "gradient_accumulation_steps": 3},
    "stage 1, small buckets": {"stage": 1, "zero_optimization": {"reduce_bucket_size": 7000}},
    "stage 1, predivide without reduce_scatter": {
        "stage": 1,
        "gradient_predivide_factor": 2.0,
        "zero_optimization": {"reduce_scatter": False},
    },
    "stage 1, bf16 accumulated in fp32": {
        "stage": 1,
        "dtype": "bf16",
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_accumulation_steps": 2,
    },
    "stage 2, bf16 accumulated in fp32": {
        "stage": 2,
        "dtype": "bf16",
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_accumulation_steps": 2,
    },
    "stage 2, small buckets, overlapping": {
        "stage": 2,
        "zero_optimization": {"reduce_bucket_size": 7000, "overlap_comm": True},
    },
    "stage 2, round robin": {"stage": 2, "zero_optimization": {"round_robin_gradients": True}},
    "stage 2, reduce to each owner": {
        "stage": 2,
        "zero_optimization": {"use_multi_rank_bucket_allreduce": False, "reduce_bucket_size": 20000},
    },
    "stage 2, gradients where they are": {"stage": 2, "zero_optimization": {"contiguous_gradients": False}},
    "stage 2, without reduce_scatter": {"stage": 2, "zero_optimization": {"reduce_scatter": False}},
    "stage 2, accumulation and clipping": {"stage": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 0.1},
    "stage 2, aligned parameters": {"stage": 2, "zero_optimization": {"parameter_alignment": True}},
    "stage 2, bf16 with fp32 communication": {"stage": 2, "dtype": "bf16", "communication_data_type": "fp32"},
    "stage 2, accumulation in the caller's hands": {"stage": 2, "managed_gradient_accumulation": False},
    "stage 2, autocast": {"stage": 2, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "stage 3, small buckets, not overlapping": {
        "stage": 3,
        "zero_optimization": {"reduce_bucket_size": 9000, "overlap_comm": False},
    },
    "stage 3, without reduce_scatter": {"stage": 3, "zero_optimization": {"reduce_scatter": False}},
    "stage 3, predivide without reduce_scatter": {
        "stage": 3,
        "gradient_predivide_factor": 4.0,
        "zero_optimization": {"reduce_scatter": False},
    },
    "stage 3, accumulation and clipping": {"stage": 3, "gradient_accumulation_steps": 2, "gradient_clipping": 0.1},
    "stage 3, bf16 with fp32 communication": {"stage": 3, "dtype": "bf16", "communication_data_type": "fp32"},
}


class PartlyFrozen(Model):
    def __init__(self) -> None:
        super().__init__()
        self.embedding.requires_grad_(False)
        self.linear1.bias.requires_grad_(False)


def compare(path: dict[str, Any], make_model: type[nn.Module] = Model, bits: int = 8, steps: int = 3) -> dict[str, Any]:
    """A few steps without and with compression, from the same start."""
    settings = {**SGD, **path}
    stage, dtype = settings.pop("stage"), settings.pop("dtype", "fp32")
    start = torch.cat([p.detach().double().flatten() for p in make_model().parameters()])
    if dtype == "bf16":
        start = start.bfloat16().double()
    plain = run(configuration(stage, dtype, **settings), steps, make_model)
    found = run(configuration(stage, dtype, {"bits": bits}, **settings), steps, make_model)
    return {
        "difference": relative_difference(found["weights"] - start, plain["weights"] - start),
        "digest": found["digest"],
        "calls": found["calls"],
        "norms": (found["norm"], plain["norm"]),
    }


def compare_all(paths: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: compare(path) for name, path in paths.items()}


def test_every_path(two_ranks: RankPool) -> None:
    ranks = two_ranks.run(compare_all, PATHS)
    wrong = {}
    for name, path in PATHS.items():
        found = ranks[0][name]
        # Weights of 16 bits are rounded, so that a step shows little of its gradient.
        tolerance = 0.05 if path.get("dtype", "fp32") == "fp32" else 0.5
        if found["difference"] > tolerance or found["digest"] != ranks[1][name]["digest"] or not found["calls"]:
            wrong[name] = found
    assert wrong == {}


def frozen() -> list[dict[str, Any]]:
    return [compare({"stage": stage}, PartlyFrozen) for stage in (0, 1, 2, 3)]


def test_frozen_parameters(two_ranks: RankPool) -> None:
    for stage, found in enumerate(two_ranks.run(frozen)[0]):
        assert found["difference"] < 0.05, f"ZeRO {stage}"


def offloaded() -> list[dict[str, Any]]:
    # DeepSpeed asks for its own CPU optimizers, which it would compile here.
    path = {"zero_force_ds_cpu_optimizer": False, "zero_optimization": OFFLOAD}
    parameters = {"zero_optimization": {**OFFLOAD, "offload_param": {"device": "cpu", "pin_memory": False}}}
    return [compare({"stage": stage, **path}) for stage in (1, 2, 3)] + [compare({"stage": 3, **path, **parameters})]


def test_optimizer_states_and_parameters_on_the_cpu(two_ranks: RankPool) -> None:
    for found in two_ranks.run(offloaded)[0]:
        assert found["difference"] < 0.05


def coalesced(stage: int) -> float:
    """Several backward passes whose gradients are reduced at once."""
    from tests.deepspeed.training import batches, engine_of

    results = []
    for qoda in (None, {"bits": 8}):
        with engine_of(configuration(stage, "fp32", qoda, **SGD)) as engine:
            data = batches(torch.distributed.get_rank())
            start = weights(engine)
            with engine.coalesce_grad_reduction():
                for _ in range(2):
                    engine.backward(engine(next(data)))
            engine.step()
            results.append(weights(engine) - start)
    return relative_difference(results[1], results[0])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_coalesced_reduction(two_ranks: RankPool, stage: int) -> None:
    for difference in two_ranks.run(coalesced, stage):
        assert difference < 0.05
