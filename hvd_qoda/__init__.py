"""Layer-wise quantized gradients and the QODA optimizers for Horovod."""

from qoda_kernels import __version__ as __version__
