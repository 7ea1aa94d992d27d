"""The front end for `torch.nn.parallel.DistributedDataParallel`: a communication hook, and its state.

model = DistributedDataParallel(Net())
model.register_comm_hook(hvd_qoda.ddp.QodaState(model, bits=5), hvd_qoda.ddp.comm_hook)
"""

from hvd_qoda.ddp.hook import QodaState, comm_hook

__all__ = ["QodaState", "comm_hook"]
