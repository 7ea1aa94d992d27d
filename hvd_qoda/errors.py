"""Errors raised by the library: what was wrong, where, and what to do."""

from qoda_kernels.errors import CodebookError, PlanError, QodaError, RegistryError, WireError

__all__ = [
    "CodebookError",
    "ConfigError",
    "ExchangeTimeoutError",
    "PlanError",
    "QodaError",
    "RankMismatchError",
    "RegistryError",
    "ReportError",
    "UnsupportedError",
    "WireError",
]


class ConfigError(QodaError, ValueError):
    """A configuration key that is unknown, impossible, or matches nothing; the message names it."""


class RankMismatchError(QodaError, RuntimeError):
    """Ranks that disagree on configuration, model, plan, version or step; the message names the difference."""


class RankLostError(QodaError, RuntimeError):
    """A rank whose connection is gone: it has ended or cannot be reached, or it takes other steps than this one."""


class UnsupportedError(QodaError, RuntimeError):
    """A feature of the host that compressed gradients cannot serve; the message says what to use instead."""


class ExchangeTimeoutError(QodaError, TimeoutError):
    """A peer did not take part in an exchange before the deadline."""


class ReportError(QodaError, RuntimeError):
    """Pictures of a run that cannot be drawn; the message says what is missing."""
