"""One rank: Horovod runs no hooks then, but compress and decompress work; and what needs no rank at all."""

import subprocess
import sys
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_qoda.compression import Compression
from hvd_qoda.config import QodaConfig
from hvd_qoda.errors import ConfigError, QodaError, RegistryError
from tests.horovod.training import (
    assert_gradients,
    local_gradients,
    loss_of,
    make_model,
    make_optimizer,
    make_qoda,
    train,
)
from tests.launcher import child_environment, run_ranks


def by_hand(scheme: str) -> None:
    model = make_model()
    compressor = make_qoda(model, exchange=scheme, worker_norms=True)
    for step in range(3):
        own = local_gradients(model, lambda step=step: loss_of(model, step))
        for name, parameter in model.named_parameters():
            parameter.grad = own[name].clone()
        contexts = [compressor.compress(p.grad) for p in model.parameters()]
        for parameter, (token, context) in zip(model.parameters(), contexts, strict=True):
            parameter.grad = compressor.decompress(token, context)
        assert_gradients(model, compressor, own)
    assert compressor.step == 3
    assert compressor.traffic.sent_bytes == 0
    assert compressor.worker_norms().world_size == 1


def without_hooks() -> None:
    model = make_model()
    compressor = make_qoda(model)
    losses = train(model, make_optimizer(model, compressor), range(20))
    assert losses[-1] < losses[0]
    assert compressor.step == 0


def with_hooks_of_elastic_training() -> None:
    model = make_model()
    compressor = make_qoda(model)
    optimizer = make_optimizer(model, compressor)
    own = local_gradients(model, lambda: loss_of(model, 0))
    loss_of(model, 0).backward()
    optimizer.synchronize()
    assert compressor.step == 1
    assert_gradients(model, compressor, own)


def calls_out_of_order() -> None:
    model = make_model()
    compressor = make_qoda(model)
    gradient = model[0].weight.grad = torch.randn(96, 40)
    token, context = compressor.compress(gradient)
    compressor.decompress(token, context)
    with pytest.raises(QodaError, match=r"'0.weight' does not belong to its last compress"):
        compressor.decompress(token, context)


def all_checks() -> None:
    for scheme in ("allgather", "reduce_scatter", "by_bytes"):
        by_hand(scheme)
    without_hooks()
    calls_out_of_order()


def test_horovod_with_one_rank_no_hooks_run_but_the_compressor_works() -> None:
    run_ranks(all_checks, 1)


def test_horovod_with_one_elastic_rank_hooks_run() -> None:
    run_ranks(with_hooks_of_elastic_training, 1, environment={"HOROVOD_ELASTIC": "1"})


def test_training_before_init_is_a_clear_error() -> None:
    assert not hvd.is_initialized()
    model = make_model()
    model[0].weight.grad = torch.zeros(96, 40)
    with pytest.raises(ConfigError, match=r"call horovod.torch.init\(\)"):
        make_qoda(model).compress(model[0].weight.grad)


def test_uninitialised_process_set_is_a_clear_error() -> None:
    run_ranks(uninitialised_process_set, 1)


def uninitialised_process_set() -> None:
    model = make_model()
    model[0].weight.grad = torch.zeros(96, 40)
    with pytest.raises(ConfigError, match="add_process_set"):
        make_qoda(model, process_set=hvd.ProcessSet([0])).compress(model[0].weight.grad)


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"bitts": 5}, ConfigError, "did you mean 'bits'"),
        ({"bits": 9}, ConfigError, "bits=9"),
        ({"config": QodaConfig(), "bits": 5}, ConfigError, "either config or keywords"),
        ({"layers": [{"name": "nothing.*", "bits": 8}]}, RegistryError, "matches no parameter"),
    ],
)
def test_impossible_keywords_are_named(keywords: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Compression.qoda(make_model(), **keywords)


def test_config_is_taken_whole() -> None:
    config = QodaConfig(bits=3, seed=4)
    assert Compression.qoda(make_model(), config=config).config is config


def test_environment_of_cgx_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CGX_COMPRESSION_QUANTIZATION_BITS", "4")
    assert Compression.qoda(make_model()).config.bits == 4
    assert Compression.qoda(make_model(), bits=6).config.bits == 6


def test_a_parameter_given_twice_is_refused() -> None:
    shared = nn.Parameter(torch.zeros(3))
    with pytest.raises(RegistryError, match="one tensor"):
        Compression.qoda([("a", shared), ("b", shared)])
    with pytest.raises(RegistryError, match="not unique: a"):
        Compression.qoda([("a", shared), ("a", nn.Parameter(torch.zeros(3)))])


def test_importing_hvd_qoda_needs_no_horovod() -> None:
    program = (
        "import sys; sys.modules['horovod'] = None; import hvd_qoda, torch\n"
        "try: hvd_qoda.Compression.qoda(torch.nn.Linear(2, 2))\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "launch/build_horovod.sh" in done.stdout
