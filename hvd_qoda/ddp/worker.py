"""The thread that exchanges gradients while backward goes on."""

import queue
import threading
import time
import weakref
from collections.abc import Callable

import torch

from hvd_qoda.codec_device import own_stream
from hvd_qoda.ddp.ordered import OrderedExchanges
from hvd_qoda.errors import ExchangeTimeoutError

__all__ = ["ExchangeThread"]

_FIRST_PAUSE_S = 20e-6
_LONGEST_PAUSE_S = 1e-3


class ExchangeThread:
    """Runs tasks in order, and between them advances the exchanges that the tasks have submitted.

    The thread ends when this object is collected or the process exits.

    Args:
        exchanges: what to advance; touched by the thread alone.
        timeout_s: seconds without any progress after which it gives up.
        where: this rank, for messages.
        failed: called in the thread with whatever a task or an exchange has raised.
        device: whose work, as far as the thread starts it, is to run beside that of other threads.
    """

    def __init__(
        self,
        exchanges: OrderedExchanges,
        timeout_s: float,
        where: str,
        failed: Callable[[Exception], None],
        device: torch.device,
    ) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        loop = _Loop(self._tasks, exchanges, timeout_s, where, failed, device)
        threading.Thread(target=loop.run, name="hvd-qoda-exchange", daemon=True).start()
        weakref.finalize(self, self._tasks.put, None)

    def submit(self, task: Callable[[], None]) -> None:
        """Run a task in the thread, after those before it."""
        self._tasks.put(task)


class _Loop:
    """What the thread does; knows nothing of the thread's owner, so that the owner can be collected."""

    def __init__(
        self,
        tasks: "queue.SimpleQueue[Callable[[], None] | None]",
        exchanges: OrderedExchanges,
        timeout_s: float,
        where: str,
        failed: Callable[[Exception], None],
        device: torch.device,
    ) -> None:
        self._tasks = tasks
        self._device = device
        self._exchanges = exchanges
        self._timeout_s = timeout_s
        self._where = where
        self._failed = failed

    def run(self) -> None:
        with own_stream(self._device):
            ended = False
            while not ended:
                try:
                    ended = self._run_until_idle()
                except Exception as error:  # whoever waits for a gradient must learn of it, whatever it is
                    self._failed(error)

    def _run_until_idle(self) -> bool:
        """One task, and everything that follows from it; returns whether it was the last one."""
        task = self._tasks.get()
        last_progress, pause = time.monotonic(), _FIRST_PAUSE_S
        while True:
            if task is None:
                return True
            task()
            while self._tasks.empty() and len(self._exchanges):
                if self._exchanges.advance():
                    last_progress, pause = time.monotonic(), _FIRST_PAUSE_S
                    continue
                if time.monotonic() - last_progress > self._timeout_s:
                    raise ExchangeTimeoutError(
                        f"{self._where}: {self._exchanges.waiting_for} did not finish within {self._timeout_s:g} s. "
                        "Check that every rank is alive and takes the same steps (the same number of batches); if a "
                        "rank may work for longer between two steps, raise timeout_s."
                    )
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            if self._tasks.empty():
                return False
            task = self._tasks.get()
            last_progress = time.monotonic()
