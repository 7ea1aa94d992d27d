"""The exchange thread ends with its owner, and does nothing after a failure; what lasts beyond a program's end."""

import gc
import threading
import time
import weakref

import pytest
import torch

from hvd_qoda.ddp.ordered import OrderedExchanges, Round
from hvd_qoda.ddp.worker import ExchangeThread
from hvd_qoda.errors import ExchangeTimeoutError
from hvd_qoda.torch_distributed.lasting import Lasting


class NeverReady:
    """An exchange whose peers do not answer."""

    waiting_for = "nobody"

    def advance(self) -> bool:
        return True

    def ready(self) -> bool:
        return False


def exchange_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "hvd-qoda-exchange"]


def start(timeout_s: float) -> tuple[ExchangeThread, OrderedExchanges, list[Exception]]:
    failures: list[Exception] = []
    exchanges = OrderedExchanges(two_groups=False)
    thread = ExchangeThread(exchanges, timeout_s, "rank 0", failures.append, torch.device("cpu"))
    return thread, exchanges, failures


def submit(thread: ExchangeThread, exchanges: OrderedExchanges) -> None:
    item = Round(NeverReady(), lambda: None, lambda: None)  # type: ignore[arg-type]
    thread.submit(lambda: exchanges.submit(item))


@pytest.mark.parametrize("waits", [False, True])
def test_the_thread_has_ended_when_its_owner_is_gone(waits: bool) -> None:
    """Else it may drop the last process group while the interpreter ends, which PyTorch answers by an abort."""
    others = exchange_threads()
    thread, exchanges, failures = start(timeout_s=60.0)
    if waits:
        submit(thread, exchanges)
        while not len(exchanges):
            time.sleep(0.001)
    del thread
    gc.collect()
    assert exchange_threads() == others
    assert not failures


def test_after_a_failure_the_thread_does_nothing() -> None:
    thread, exchanges, failures = start(timeout_s=0.05)
    submit(thread, exchanges)
    while not failures:
        time.sleep(0.001)
    done: list[int] = []
    thread.submit(lambda: done.append(1))
    time.sleep(0.1)
    assert isinstance(failures[0], ExchangeTimeoutError)
    assert (len(failures), done) == (1, [])


def test_what_lasts_is_alive_without_any_other_reference() -> None:
    class Group:
        pass

    group = Group()
    alive = weakref.ref(group)
    lasting = Lasting(group)
    lasting.begin()
    lasting.begin()
    again = weakref.ref(lasting)
    del group, lasting
    gc.collect()
    assert alive() is not None
    kept = again()
    assert kept is not None
    kept.end()
    kept.end()
    del kept
    gc.collect()
    assert alive() is None
