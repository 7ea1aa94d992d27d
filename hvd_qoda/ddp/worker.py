"""The thread that exchanges gradients while backward goes on."""

import queue
import threading
import time
import weakref
from collections.abc import Callable

import torch

from hvd_qoda.codec_device import own_stream
from hvd_qoda.ddp.ordered import OrderedExchanges
from hvd_qoda.transport import late

__all__ = ["ExchangeThread"]

_FIRST_PAUSE_S = 20e-6
_LONGEST_PAUSE_S = 1e-3
_LONGEST_END_S = 5.0  # it may be in a collective of a step's end, whose own deadline is later


class ExchangeThread:
    """Runs tasks in order, and between them advances the exchanges that the tasks have submitted.

    The thread ends when this object is collected or the program ends, and whoever lets go of the object waits for that:
    a thread that is still about its last objects when the interpreter ends makes PyTorch abort the process. After a
    failure it does nothing any more.

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
        stop = threading.Event()
        loop = _Loop(self._tasks, exchanges, timeout_s, where, failed, device, stop)
        thread = threading.Thread(target=loop.run, name="hvd-qoda-exchange", daemon=True)
        thread.start()
        weakref.finalize(self, _end, self._tasks, stop, thread)

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
        stop: threading.Event,
    ) -> None:
        self._tasks = tasks
        self._stop = stop
        self._device = device
        self._exchanges = exchanges
        self._timeout_s = timeout_s
        self._where = where
        self._failed = failed

    def run(self) -> None:
        with own_stream(self._device):
            try:
                while self._run_until_idle():
                    pass
            except Exception as error:  # whoever waits for a gradient must learn of it, whatever it is
                self._failed(error)
                self._exchanges.forget()
                while self._tasks.get() is not None:
                    pass  # whose futures have failed, or fail when they are made

    def _run_until_idle(self) -> bool:
        """One task, and everything that follows from it; returns whether there may be another one."""
        task = self._tasks.get()
        last_progress, pause = time.monotonic(), _FIRST_PAUSE_S
        while True:
            if task is None:
                return False
            task()
            while self._tasks.empty() and len(self._exchanges):
                if self._stop.is_set():
                    return False
                if self._exchanges.advance():
                    last_progress, pause = time.monotonic(), _FIRST_PAUSE_S
                    continue
                if time.monotonic() - last_progress > self._timeout_s:
                    raise late(f"{self._where}: {self._exchanges.waiting_for}", self._timeout_s)
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            if self._tasks.empty():
                return True
            task = self._tasks.get()
            last_progress = time.monotonic()


def _end(
    tasks: "queue.SimpleQueue[Callable[[], None] | None]", stop: threading.Event, thread: threading.Thread
) -> None:
    """End the thread, whatever it waits for, and wait until it has let go of everything."""
    stop.set()
    tasks.put(None)
    if thread is not threading.current_thread():
        thread.join(_LONGEST_END_S)
