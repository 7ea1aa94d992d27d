"""Which parameter a gradient belongs to.

Stock Horovod hands the compressor a bare tensor. It is found by identity: it is the `grad` of one of the model's
parameters. The order of calls says nothing, because hooks fire in another order on every rank; it only helps to guess.
"""

from collections.abc import Iterable, Mapping

import torch

from hvd_qoda.errors import UnsupportedError

__all__ = ["GradientIndex"]

_BITS_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class GradientIndex:
    """Finds the name of the parameter that a gradient belongs to.

    Args:
        parameters: name -> parameter.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._parameters = dict(parameters)
        self._names_by_shape: dict[tuple[int, ...], list[str]] = {}
        for name, parameter in self._parameters.items():
            self._names_by_shape.setdefault(tuple(parameter.shape), []).append(name)
        self._by_gradient: dict[int, str] = {}  # id of a gradient seen before -> name
        self._next: dict[str | None, str] = {}  # name -> the one that came after it last time
        self._last: str | None = None

    def name_of(self, gradient: torch.Tensor, taken: Iterable[str] = ()) -> str:
        """Name of the parameter whose gradient this is.

        Usually one or two comparisons: a gradient that is kept over steps is known by its id, one that is made anew is
        guessed to follow the same one as in the last step. Else all parameters of its shape are compared.

        Args:
            gradient: a dense gradient, or the dense form of a sparse one.
            taken: names whose gradients were handed over in this step already; only asked for dense forms.

        Raises:
            UnsupportedError: for a parameter itself (Adasum), a sparse tensor, or a tensor that belongs to no
                parameter or to several.
        """
        if gradient.is_sparse:
            raise UnsupportedError(
                "a sparse gradient reached the compressor, which Horovod does with groups: use sparse_as_dense=True "
                "without groups, or dense gradients (torch.nn.Embedding(..., sparse=False))"
            )
        name = self._by_identity(gradient)
        if name is None:
            name = self._by_dense_form(gradient, set(taken))
        else:
            if len(self._by_gradient) > 4 * len(self._parameters):
                self._by_gradient.clear()  # gradients that are made anew in every step leave their ids behind
            self._by_gradient[id(gradient)] = name
        self._next[self._last] = name
        self._last = name
        return name

    def _by_identity(self, gradient: torch.Tensor) -> str | None:
        for guess in (self._by_gradient.get(id(gradient)), self._next.get(self._last)):
            if guess is not None and self._parameters[guess].grad is gradient:
                return guess
        for name in self._names_by_shape.get(tuple(gradient.shape), ()):
            parameter = self._parameters[name]
            if parameter.grad is gradient:
                return name
            if parameter is gradient:
                raise UnsupportedError(
                    f"the compressor was given parameter {name!r} itself, as Horovod does with op=hvd.Adasum. Adasum "
                    "combines changes of parameters, whose quantization errors would not average out: use "
                    "op=hvd.Average or op=hvd.Sum"
                )
        return None

    def _by_dense_form(self, gradient: torch.Tensor, taken: set[str]) -> str:
        """With sparse_as_dense=True Horovod makes a dense copy of a sparse gradient, which no parameter holds."""
        names = self._names_by_shape.get(tuple(gradient.shape), ())
        candidates = [name for name in names if self._is_sparse_with_dtype(name, gradient.dtype)]
        candidates = [name for name in candidates if name not in taken] or candidates
        if len(candidates) > 1:
            candidates = [name for name in candidates if _same_bits(self._dense(name), gradient)]
        if len(candidates) == 1:
            return candidates[0]
        what = f"a {gradient.dtype} tensor of shape {tuple(gradient.shape)}"
        if candidates:
            raise UnsupportedError(
                f"{what} equals the sparse gradients of several parameters: {', '.join(candidates)}; the host does not "
                "say whose it is. Call zero_grad(set_to_none=True) before every step, or give the parameters different "
                "shapes."
            )
        raise UnsupportedError(
            f"{what} reached the compressor but is the gradient of no parameter that it knows. Give the compressor the "
            "same parameters as hvd.DistributedOptimizer, do not replace gradients between backward() and step(), and "
            "do not use it for tensors other than gradients."
        )

    def _is_sparse_with_dtype(self, name: str, dtype: torch.dtype) -> bool:
        gradient = self._parameters[name].grad
        return gradient is not None and gradient.is_sparse and gradient.dtype == dtype

    def _dense(self, name: str) -> torch.Tensor:
        gradient = self._parameters[name].grad
        assert gradient is not None  # as _is_sparse_with_dtype has found
        return gradient.to_dense()


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equality in which NaN equals itself."""
    dtype = _BITS_DTYPES[one.dtype.itemsize]
    return one.device == other.device and torch.equal(one.contiguous().view(dtype), other.contiguous().view(dtype))
