"""How the single parameters' gradients travel under the stock optimizer: an exchange for each, or Horovod's own way."""

from dataclasses import dataclass

import torch

from hvd_qoda.exchange import Exchange
from hvd_qoda.fusion import gradient_slice, host_reduces
from hvd_qoda.horovod.world import World
from hvd_qoda.session import Session
from qoda_kernels.layout import MessagePlan
from qoda_kernels.registry import COMPRESSIBLE_DTYPES, ParameterEntry

__all__ = ["ParameterRoutes", "Route"]


@dataclass(frozen=True)
class Route:
    """How one parameter's gradients travel.

    Attributes:
        entry: the parameter.
        exchange: their exchange; None if Horovod reduces them itself, or if they are empty and do not travel.
        by_host: whether Horovod reduces them itself.
    """

    entry: ParameterEntry
    exchange: Exchange | None
    by_host: bool

    @property
    def is_exact(self) -> bool:
        """Whether they travel as they are."""
        return self.exchange is None or all(segment.format.is_exact for segment in self.exchange.plan.segments)


class ParameterRoutes:
    """Routes of all parameters, made when they are first asked for.

    Args:
        session: the model's codebooks.
        world: the ranks.
    """

    def __init__(self, session: Session, world: World) -> None:
        self._session = session
        self._world = world
        self._routes: dict[tuple[str, torch.dtype, str], Route] = {}

    def begin_step(self) -> None:
        """Begin a step; see `World.begin_step`. Routes may change."""
        self._world.begin_step(self._messages, mixed=True)

    def of(self, name: str, dtype: torch.dtype) -> Route:
        """How a parameter's gradients of this dtype travel in the step under way."""
        scheme = self._world.scheme_of(name) if self._quantizes(name, dtype) else "off"
        found = self._routes.get((name, dtype, scheme))
        if found is None:
            found = self._routes[name, dtype, scheme] = self._new_route(name, dtype, scheme)
        return found

    def _new_route(self, name: str, dtype: torch.dtype, scheme: str) -> Route:
        entry = self._session.registry.parameters[name]
        if entry.numel == 0:
            return Route(entry, None, by_host=False)
        if scheme == "off" and host_reduces(dtype):
            return Route(entry, None, by_host=True)
        plan = self._plan(name, dtype)
        if scheme == "off":
            return Route(entry, self._world.new_exact_exchange(plan, name), by_host=False)
        return Route(entry, self._world.new_exchange(plan, name, scheme), by_host=False)

    def _plan(self, name: str, dtype: torch.dtype) -> MessagePlan:
        registry = self._session.registry
        entry = registry.parameters[name]
        return MessagePlan.build([gradient_slice(entry, dtype)], registry.codebooks)

    def _quantizes(self, name: str, dtype: torch.dtype) -> bool:
        registry = self._session.registry
        entry = registry.parameters[name]
        exact = registry.codebooks[entry.codebook].is_exact
        return entry.numel > 0 and dtype in COMPRESSIBLE_DTYPES and not exact

    def _messages(self) -> dict[str, MessagePlan]:
        """A message for each parameter that can be quantized; gradients mostly have their parameter's dtype."""
        entries = self._session.registry.parameters
        return {
            name: self._plan(name, entry.dtype) for name, entry in entries.items() if self._quantizes(name, entry.dtype)
        }
