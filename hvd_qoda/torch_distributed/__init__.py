"""The host `torch.distributed`: what is needed to exchange messages over its process groups."""

from hvd_qoda.torch_distributed.transport import TorchTransport

__all__ = ["TorchTransport"]
