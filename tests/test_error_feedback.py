"""Error feedback on exchanges among ranks of one process."""

from typing import Any

import numpy as np
import pytest
import torch

from hvd_qoda.config import QodaConfig
from hvd_qoda.error_feedback import ErrorFeedback
from hvd_qoda.errors import ConfigError, UnsupportedError
from hvd_qoda.exchange import Stamp
from hvd_qoda.schemes import make_exchange
from hvd_qoda.session import Session
from hvd_qoda.transport import LocalTransport, all_gather_array
from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import MessagePlan, Slice
from tests.in_memory_transport import InMemoryGroup

CODEBOOKS = {"body": Codebook.uniform(3, clip=0.7), "exact": Codebook.exact()}
SIZE = 1500


def plan(dtype: torch.dtype = torch.float32) -> MessagePlan:
    slices = [Slice("w", 0, SIZE, dtype, "body", 0), Slice("b", 0, 7, dtype, "exact", SIZE)]
    return MessagePlan.build(slices, CODEBOOKS)


def gradients(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype) for size in (SIZE, 7)]


def step(feedback: ErrorFeedback, exchange: Any, values: list[torch.Tensor], counter: int) -> list[torch.Tensor]:
    """One step of a rank; returns what it has sent."""
    corrected = feedback.corrected(exchange, values)
    exchange.start(corrected, Stamp(5, counter, 0))
    sent: list[torch.Tensor] = exchange.own_message().decode()
    feedback.keep(exchange, sent)
    out = [torch.empty_like(value) for value in values]
    while not exchange.advance():
        pass
    exchange.finish(out)
    for result in out:
        feedback.arrived(result)
    feedback.end_step()
    return sent


@pytest.mark.parametrize("scheme", ["allgather", "reduce_scatter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_is_what_was_sent_and_the_residual(scheme: str, dtype: torch.dtype) -> None:
    def train(transport: Any) -> None:
        exchange = make_exchange(scheme, plan(dtype), CODEBOOKS, transport, "x")
        feedback = ErrorFeedback()
        before = torch.zeros(SIZE)
        for counter in range(4):
            values = gradients(10 * counter + transport.rank, dtype)
            sent = step(feedback, exchange, values, counter)
            all_gather_array(transport, np.zeros(1), f"step {counter}")  # buffers are shared here: nobody runs ahead
            residual = feedback.residual("w")
            assert residual is not None
            assert residual.dtype == torch.float32
            # The definition, bit for bit; in exact arithmetic: input = sent + residual.
            assert torch.equal(residual, (values[0].float() + before) - sent[0])
            assert feedback.residual("b") is None
            assert torch.equal(sent[1].to(dtype), values[1])
            before = residual
        assert before.abs().max() > 0.7  # coordinates beyond the clip value wait for their turn

    InMemoryGroup(2).run(train)


def test_what_is_clipped_arrives_in_the_end() -> None:
    """Every fourth gradient has coordinates far beyond the clip value; they are sent in the steps that follow."""
    exchange = make_exchange("allgather", plan(), CODEBOOKS, LocalTransport(), "x")
    steps, given = 200, torch.zeros(SIZE)
    with_feedback, without, feedback = torch.zeros(SIZE), torch.zeros(SIZE), ErrorFeedback()
    for counter in range(steps):
        values = [0.1 * gradients(counter)[0], torch.zeros(7)]
        values[0][:10] = 2.0 if counter % 4 == 0 else 0.0
        given += values[0] / steps
        with_feedback += step(feedback, exchange, values, counter)[0] / steps
        without += step(ErrorFeedback(), exchange, values, counter)[0] / steps
    residual = feedback.residual("w")
    assert residual is not None
    np.testing.assert_allclose((with_feedback + residual / steps).numpy(), given.numpy(), atol=1e-5)
    assert (with_feedback - given).abs().max() < 2.0 / steps
    assert (without - given)[:10].max() < -0.3  # 0.7 instead of 2 every fourth time


def test_steps_that_overflow_leave_no_trace() -> None:
    def train(transport: Any) -> None:
        exchange = make_exchange("allgather", plan(), CODEBOOKS, transport, "x")
        feedback = ErrorFeedback()
        step(feedback, exchange, gradients(transport.rank), 0)
        all_gather_array(transport, np.zeros(1), "step")  # buffers are shared here: nobody runs ahead
        before = feedback.residual("w")
        values = gradients(7 + transport.rank)
        if transport.rank == 1:
            values[1][3] = float("inf")  # on one rank, in an exact slice
        step(feedback, exchange, values, 1)
        after = feedback.residual("w")
        assert before is not None
        assert after is not None
        assert torch.equal(before, after)

    InMemoryGroup(2).run(train)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_travels_as_it_is_takes_the_residual_along(dtype: torch.dtype) -> None:
    exchange = make_exchange("allgather", plan(dtype), CODEBOOKS, LocalTransport(), "x")
    feedback = ErrorFeedback()
    step(feedback, exchange, gradients(1, dtype), 0)
    before = feedback.residual("w")
    assert before is not None
    gradient = gradients(2, dtype)[0].view(30, 50)
    expected = gradient.float() + before.view(30, 50)
    feedback.add_to("w", gradient)
    feedback.add_to("b", gradients(2, dtype)[1])  # has none
    assert torch.equal(gradient, expected.to(dtype))
    assert torch.equal(feedback.residual("w"), before)  # until the step has ended well
    feedback.end_step()
    assert torch.equal(feedback.residual("w"), (expected - gradient.float()).view(-1))


def test_residuals_can_decay_and_be_forgotten() -> None:
    exchange = make_exchange("allgather", plan(), CODEBOOKS, LocalTransport(), "x")
    feedback = ErrorFeedback()
    step(feedback, exchange, gradients(1), 0)
    before = feedback.residual("w")
    assert before is not None
    again = ErrorFeedback()
    again.load_state_dict(feedback.state_dict())
    feedback.scale(0.25)
    assert torch.equal(feedback.residual("w"), before * 0.25)
    assert torch.equal(again.residual("w"), before)
    feedback.scale(0.0)
    assert feedback.residual("w") is None
    with pytest.raises(ConfigError, match="finite"):
        feedback.scale(float("nan"))


def test_a_second_exchange_before_the_step_ends_goes_on_from_the_first() -> None:
    exchange = make_exchange("allgather", plan(), CODEBOOKS, LocalTransport(), "x")
    feedback, total = ErrorFeedback(), torch.zeros(SIZE, dtype=torch.float64)
    for counter in range(2):
        values = gradients(counter)
        corrected = feedback.corrected(exchange, values)
        exchange.start(corrected, Stamp(5, counter, 0))
        sent = exchange.own_message().decode()
        feedback.keep(exchange, sent)
        exchange.finish([torch.empty_like(value) for value in values])
        total += values[0].double() - sent[0].double()
    feedback.end_step()
    residual = feedback.residual("w")
    assert residual is not None
    np.testing.assert_allclose(residual.numpy(), total.numpy(), atol=1e-6)


def test_exchanges_without_an_own_message_are_refused() -> None:
    class Summing:
        has_own_message = False

    with pytest.raises(UnsupportedError, match="allgather"):
        ErrorFeedback().corrected(Summing(), [])  # type: ignore[arg-type]  # all that is looked at


def test_sessions_without_error_feedback_say_so() -> None:
    session = Session([("w", torch.zeros(40, 40))], QodaConfig())
    with pytest.raises(ConfigError, match="error_feedback=True"):
        _ = session.error_feedback
    values = [torch.ones(3)]
    exchange = make_exchange("allgather", plan(), CODEBOOKS, LocalTransport(), "x")
    assert session.corrected(exchange, values) is values
