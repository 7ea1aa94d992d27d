"""Layer-wise quantized gradients for DeepSpeed."""

from qoda_kernels import __version__ as __version__
