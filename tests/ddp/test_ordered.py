"""Exchanges under way at once start their collectives in the same order on every rank, however slow each of them is."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch

from hvd_qoda.ddp.ordered import OrderedExchanges, Round
from hvd_qoda.exchange import AllGatherExchange, ReduceScatterExchange
from hvd_qoda.shares import OwnMean
from hvd_qoda.transport import Handle
from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import MessagePlan, Slice

CODEBOOKS = {"w": Codebook.uniform(4, bucket_size=128)}


class SlowTransport:
    """One of two ranks; its peer's messages equal its own, and come after a random number of questions."""

    rank, size, ranks, timeout_s = 0, 2, (0, 1), 5.0

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.started: list[str] = []

    def start_all_gather(self, message: torch.Tensor, receive_bytes: Sequence[int], name: str) -> Handle:
        self.started.append(name)
        return SlowHandle(name, self._random.randrange(20))

    def start_all_to_all(
        self, message: torch.Tensor, send_bytes: Sequence[int], receive_bytes: Sequence[int], name: str
    ) -> Handle:
        self.started.append(name)
        return SlowHandle(name, self._random.randrange(20))


class SlowHandle:
    def __init__(self, name: str, questions: int) -> None:
        self.name = name
        self._questions = questions

    def ready(self) -> bool:
        self._questions -= 1
        return self._questions < 0

    def wait(self) -> list[torch.Tensor]:
        return []


def collectives(
    seed: int, two_groups: bool, schemes: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], list[int]]:
    """Names of the collectives in the order of their start, and numbers of the rounds in the order of their end."""
    # What arrives does not matter here.
    for method in ("decode", "encode"):
        monkeypatch.setattr(OwnMean, method, lambda *_: None)
    transport = SlowTransport(seed)
    ordered = OrderedExchanges(two_groups)
    finished: list[int] = []
    for number, scheme in enumerate(schemes):
        plan = MessagePlan.build([Slice("p", 0, 1000, torch.float32, "w", 0)], CODEBOOKS)
        kind = AllGatherExchange if scheme == "g" else ReduceScatterExchange
        exchange = kind(plan, CODEBOOKS, transport, f"{number}")
        begin = starter(exchange, transport, number)
        ordered.submit(Round(exchange, begin, partial(finished.append, number)))
    questions = 0
    while len(ordered):
        ordered.advance()
        questions += 1
        assert questions < 10_000
    return transport.started, finished


def starter(exchange: Any, transport: SlowTransport, number: int) -> Callable[[], None]:
    """Starts the first collective without encoding anything."""

    def start() -> None:
        if isinstance(exchange, AllGatherExchange):
            exchange._handle = transport.start_all_gather(torch.empty(0), [0, 0], f"{number}.all_gather")
        else:
            exchange._first = transport.start_all_to_all(torch.empty(0), [0, 0], [0, 0], f"{number}.all_to_all")

    return start


@pytest.mark.parametrize("two_groups", [False, True])
@pytest.mark.parametrize("schemes", ["ssss", "gggg", "sgsgsg", "ssggssgg"])
def test_the_order_does_not_depend_on_time(two_groups: bool, schemes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for seed in range(20):
        with monkeypatch.context() as patch:
            seen.append(collectives(seed, two_groups, schemes, patch))
    for started, finished in seen:
        for kind in ("all_gather", "all_to_all"):
            numbers = [int(name.split(".")[0]) for name in started if name.endswith(kind)]
            assert numbers == sorted(numbers)
        assert two_groups or started == seen[0][0]
        assert finished == list(range(len(schemes)))
