"""The compressor in Horovod's elastic training.

`hvd.elastic.TorchState(model=model, optimizer=optimizer, compression=compression)` saves, restores and synchronizes the
compressor with the rest. After a change of ranks all of them take over rank 0's state; what only one rank knows
(messages with worker_norms=True, residuals with error_feedback=True) is forgotten and counts as zero.
"""

import copy

from horovod.torch.elastic.state import StateHandler, get_handler_registry
from horovod.torch.functions import broadcast_object

from hvd_qoda.horovod.compressor import QodaCompressor
from hvd_qoda.horovod.metered import MeteredCompressor

__all__ = ["CompressorStateHandler", "register_state_handler"]


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
        """Take over rank 0's state."""
        common = {key: None if key == "rank_private" else value for key, value in self.value.state_dict().items()}
        self.value.load_state_dict(broadcast_object(common, root_rank=0, name="hvd_qoda.state"))
        self.save()


def register_state_handler() -> None:
    """Tell Horovod's `TorchState` how to keep compressors; a second call does nothing."""
    registry = get_handler_registry()
    for compressor in (QodaCompressor, MeteredCompressor):
        if not any(handled is compressor for handled, _ in registry):
            registry.append((compressor, CompressorStateHandler))
