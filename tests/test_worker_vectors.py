"""Worker norms over several ranks of one process; staging; the account of a step."""

from typing import Any

import numpy as np
import pytest
import torch

from hvd_qoda.errors import ConfigError, QodaError
from hvd_qoda.exchange import Stamp
from hvd_qoda.optim import WorkerNorms
from hvd_qoda.schemes import make_exchange
from hvd_qoda.staging import cpu_values, written_back
from hvd_qoda.step_account import CONTROL, StepAccount
from hvd_qoda.telemetry import LayerTypeRecord
from hvd_qoda.transport import LocalTransport, all_gather_array
from hvd_qoda.worker_vectors import ExactVector, WorkerVectors
from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import MessagePlan, Slice
from tests.in_memory_transport import InMemoryGroup

CODEBOOKS = {"body": Codebook.uniform(5)}


def exact(*values: float) -> ExactVector:
    return ExactVector((torch.tensor(values),), ("a",))


def test_norms_are_summed_over_ranks_and_parameters() -> None:
    def train(transport: Any) -> list[WorkerNorms]:
        vectors = WorkerVectors()
        found = []
        for step in (1.0, 2.0):
            own = step * (1 + transport.rank)
            vectors.add("b", exact(own, own))
            vectors.add("a", exact(3.0))
            vectors.end_step({"a": None, "b": None}, transport)
            found.append(vectors.last)
        return found

    results = InMemoryGroup(2).run(train)
    # Rank k holds (3, s, s) with s = step (k + 1).
    first, second = WorkerNorms(9 + 2 + 9 + 8, 9 + 2 + 9 + 8, 2), WorkerNorms(9 + 8 + 9 + 32, 2 + 8, 2)
    assert results == [[first, second]] * 2


def test_a_parameter_that_takes_no_part_keeps_its_vector() -> None:
    vectors, transport = WorkerVectors(), LocalTransport()
    order = {"a": None, "b": None}
    vectors.add("a", exact(1.0))
    vectors.add("b", exact(5.0))
    vectors.end_step(order, transport)
    vectors.add("a", exact(2.0))
    vectors.end_step(order, transport)
    assert vectors.last == WorkerNorms(4.0, 1.0, 1)
    vectors.add("b", exact(7.0))
    vectors.end_step(order, transport)
    assert vectors.last == WorkerNorms(49.0, 4.0, 1)


def test_abandoned_and_non_finite_steps_leave_the_vectors_before() -> None:
    vectors, transport = WorkerVectors(), LocalTransport()
    vectors.add("a", exact(1.0))
    vectors.end_step({"a": None}, transport)
    vectors.add("a", exact(100.0))
    vectors.abandon_step()
    vectors.add("a", exact(float("nan")))
    vectors.end_step({"a": None}, transport)
    assert np.isnan(vectors.last.squared_norms)
    vectors.add("a", exact(3.0))
    vectors.end_step({"a": None}, transport)
    assert vectors.last == WorkerNorms(9.0, 4.0, 1)


@pytest.mark.parametrize("scheme", ["allgather", "reduce_scatter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_messages_are_saved_and_restored_with_the_codebooks_of_their_step(scheme: str, dtype: torch.dtype) -> None:
    plan = MessagePlan.build([Slice("a", 0, 3000, dtype, "body", 0)], CODEBOOKS)
    transport = LocalTransport()
    exchange = make_exchange(scheme, plan, CODEBOOKS, transport, "x")

    def send(vectors: WorkerVectors, counter: int) -> None:
        exchange.start([torch.randn(3000).to(dtype)], Stamp(0, counter, 0))
        while not exchange.ready():
            pass
        exchange.finish([torch.empty(3000, dtype=dtype)])
        vectors.add("a", exchange.own_message())
        vectors.add("b", exact(1.0))
        vectors.end_step({"a": None, "b": None}, transport)

    vectors, restored = WorkerVectors(), WorkerVectors()
    torch.manual_seed(0)
    send(vectors, 1)
    state = vectors.state_dict()
    exchange.use_codebooks({"body": Codebook.exponential(5, version=1)})
    asked = []

    def exchange_of(name: str, asked_dtype: torch.dtype) -> Any:
        asked.append((name, asked_dtype))
        return exchange

    restored.load_state_dict(state, exchange_of)
    assert asked == [("a", dtype)]
    assert restored.last == vectors.last
    for each in (vectors, restored):
        torch.manual_seed(1)
        send(each, 2)
    assert restored.last == vectors.last
    with pytest.raises(ConfigError, match=r"'a'.*not compressed now"):
        restored.load_state_dict(state, lambda name, dtype: None)
    restored.forget()
    with pytest.raises(QodaError, match="no exchange has finished"):
        _ = restored.last


# -- staging ---------------------------------------------------------------------------------------------------------


def test_contiguous_gradients_are_read_and_written_in_place() -> None:
    gradient = torch.arange(6.0).view(2, 3)
    values = cpu_values(gradient)
    assert values.data_ptr() == gradient.data_ptr()
    result = written_back(gradient, lambda out: out.copy_(values * 2))
    assert result is gradient
    assert torch.equal(gradient, torch.arange(6.0).view(2, 3) * 2)


@pytest.mark.parametrize(
    "gradient",
    [
        torch.arange(6.0).view(3, 2).t(),
        torch.arange(16.0).view(1, 2, 2, 4).to(memory_format=torch.channels_last),
        torch.arange(3.0).view(3, 1).expand(3, 4),
        torch.tensor(5.0),
        torch.empty(0, 3),
    ],
    ids=["transposed", "channels_last", "expanded", "scalar", "empty"],
)
def test_other_layouts_are_read_in_row_major_order_and_keep_their_shape(gradient: torch.Tensor) -> None:
    before = gradient.clone()
    values = cpu_values(gradient)
    assert values.dim() == 1
    assert values.is_contiguous()
    assert values.tolist() == before.flatten().tolist()
    expected = values * 2
    result = written_back(gradient, lambda out: out.copy_(expected))
    assert result.shape == gradient.shape
    assert torch.equal(result, before * 2)


def test_gradients_that_belong_to_a_graph_are_no_obstacle() -> None:
    gradient = torch.ones(3, requires_grad=True)
    assert not cpu_values(gradient).requires_grad
    written_back(gradient, lambda out: out.fill_(2.0))
    assert gradient.tolist() == [2.0, 2.0, 2.0]


# -- account ---------------------------------------------------------------------------------------------------------


def test_account_adds_up_by_codebook_and_explains_all_bytes() -> None:
    codebooks = {"body": Codebook.uniform(5), "bias": Codebook.exact(), "unused": Codebook.uniform(4)}
    account = StepAccount()
    account.add("body", 100, 600.0, 90.5)
    account.add("body", 50, 300.0, 45.0)
    account.add("bias", 10, 60.0, 60.0)
    account.add_error("body", torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.0]))
    account.add_error("body", torch.tensor([0.0, 5.0]), torch.tensor([0.0, 4.0]))
    account.add_exact("bias")
    assert account.records(codebooks, 200.0, ["bias", "body", "unused"]) == [
        LayerTypeRecord("body", 5, 150, 900, 136, (0.25 + 1.0) / 30.0, codebooks["body"].levels),
        LayerTypeRecord("bias", 32, 10, 60, 60, 0.0, None),
        LayerTypeRecord(CONTROL, 32, 0, 0, 4),
    ]


def test_account_without_measurement_and_without_control_bytes() -> None:
    account = StepAccount()
    account.add("body", 1, 8.0, 5.0)
    assert account.records(CODEBOOKS, 5.0, []) == [LayerTypeRecord("body", 5, 1, 8, 5, None, None)]


# -- small exact arrays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 0), (2, 2)])
def test_arrays_are_gathered_exactly(shape: tuple[int, ...]) -> None:
    def gather(transport: Any) -> np.ndarray:
        values = np.full(shape, 0.1 + transport.rank)
        return all_gather_array(transport, values, "values")

    for gathered in InMemoryGroup(3).run(gather):
        assert gathered.shape == (3, *shape)
        assert np.array_equal(gathered, np.stack([np.full(shape, 0.1 + rank) for rank in range(3)]))
