"""Numba CPU kernels: `reference.py`, fast. Each must give the reference's bits.

A kernel works on a list of **parts**, runs of whole buckets of any segments of a message, all with one codebook and one
dtype; messages and tensors come as addresses, so that a call costs the host about a microsecond. Kernels are compiled
per (code width, lanes, rounding method, gradient dtype) and cached on disk. They release the GIL, allocate nothing but
one bucket of scratch, and never read or write outside the tensors.

What makes them fast: one pass over the memory, in which the next tile is asked for while this one is in work; all
arithmetic on vectors of 32-bit words (`tiles.py`), rounding to nearest by adding 1.5 * 2^23 and reading the low bits,
one hash for two coordinates, and codes that stay in registers until they are packed.

Imports go one way, from `encoding.py`, `decoding.py`, `rotated.py` and `exact.py`, which make the kernels, down to
`tiles.py` and `vectors.py`.
"""
