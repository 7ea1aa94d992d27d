"""Errors raised by the codecs: what was wrong, where, and what to do."""


class QodaError(Exception):
    """Base class of every error that this project raises on purpose."""


class CodebookError(QodaError, ValueError):
    """A codebook that cannot exist: impossible bits, levels, bucket size, norm or format."""


class PlanError(QodaError, ValueError):
    """Tensors that do not fit the message plan, or a plan that cannot be laid out."""


class WireError(QodaError, ValueError):
    """A message that is damaged, or is not the message that was expected."""


class RegistryError(QodaError, ValueError):
    """A registry of codebooks that cannot be built, updated or restored."""


class ThreadCountError(QodaError, ValueError):
    """A number of threads with which nothing can run."""


class KernelError(QodaError, RuntimeError):
    """A compiled kernel that could not do its work."""
