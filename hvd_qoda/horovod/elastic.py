"""The compressor in Horovod's elastic training.

`hvd.elastic.TorchState(model=model, optimizer=optimizer, compression=compression)` saves, restores and synchronizes the
compressor with the rest. After a change of ranks all of them take over rank 0's state. What only one rank knows is its
own. With error_feedback=True a rank that stays keeps its residuals; those of a lost rank are lost with it, and a new
one begins with zeros. Last messages, which worker_norms=True compares with, are forgotten where ranks have changed.
"""

import copy
import logging
from typing import Any

import horovod.torch as hvd
from horovod.torch.elastic.state import StateHandler, get_handler_registry
from horovod.torch.functions import broadcast_object

from hvd_qoda.horovod.compressor import QodaCompressor
from hvd_qoda.horovod.metered import MeteredCompressor

__all__ = ["CompressorStateHandler", "register_state_handler"]

_logger = logging.getLogger(__name__)


class CompressorStateHandler(StateHandler):
    """Keeps a compressor's state for Horovod's elastic training."""

    def __init__(self, compressor: QodaCompressor | MeteredCompressor) -> None:
        super().__init__(compressor)
        self.save()

    def save(self) -> None:
        """Remember the present state."""
        self._saved = copy.deepcopy(self.value.state_dict())

    def restore(self) -> None:
        """Go back to the remembered state, after a failure within a step."""
        self.value.load_state_dict(copy.deepcopy(self._saved))

    def sync(self) -> None:
        """Take over rank 0's state, and keep what is this rank's own."""
        state = self.value.state_dict()
        common = {key: None if key == "rank_private" else value for key, value in state.items()}
        shared = broadcast_object(common, root_rank=0, name="hvd_qoda.state")
        self.value.load_state_dict({**shared, "rank_private": self._own(state.get("rank_private"))})
        self.save()

    def _own(self, state: dict[str, Any] | None) -> dict[str, Any] | None:
        """This rank's own state, as far as it holds among the ranks that there are now."""
        if state is None:
            return None
        process_set = self.value.process_set or hvd.global_process_set
        then, now = self._saved["rank_private"], (process_set.rank(), process_set.size())
        before = (then["rank"], then["size"])
        kept = {key: value for key, value in state.items() if key == "residuals" or before == now}
        if before != now:
            dropped = [f"{key!r}" for key in state if key not in ("rank", "size", *kept)]
            _logger.warning(
                "elastic training: rank %d of %d is rank %d of %d now. It keeps its residuals of error feedback (%d "
                "slices)%s; those of lost ranks are lost with them, and new ranks begin with zeros",
                *before,
                *now,
                len(kept.get("residuals", ())),
                f" and forgets its {', '.join(dropped)} messages" if dropped else "",
            )
        return {**kept, "rank": now[0], "size": now[1]}


def register_state_handler() -> None:
    """Tell Horovod's `TorchState` how to keep compressors; a second call does nothing."""
    registry = get_handler_registry()
    for compressor in (QodaCompressor, MeteredCompressor):
        if not any(handled is compressor for handled, _ in registry):
            registry.append((compressor, CompressorStateHandler))
