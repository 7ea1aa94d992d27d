"""How the single parameters' gradients travel under the stock optimizer: an exchange for each, or Horovod's own way."""

from dataclasses import dataclass

import torch

from hvd_qoda.exchange import Exchange
from hvd_qoda.horovod.world import World
from hvd_qoda.session import Session
from qoda_kernels.layout import MessagePlan, Slice
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


class ParameterRoutes:
    """Routes of all parameters, made when they are first asked for.

    Args:
        session: the model's codebooks.
        world: the ranks.
    """

    def __init__(self, session: Session, world: World) -> None:
        self._session = session
        self._world = world
        self._routes: dict[tuple[str, torch.dtype], Route] = {}

    def of(self, name: str, dtype: torch.dtype) -> Route:
        """How a parameter's gradients of this dtype travel."""
        found = self._routes.get((name, dtype))
        if found is None:
            found = self._routes[name, dtype] = self._new_route(name, dtype)
        return found

    def _new_route(self, name: str, dtype: torch.dtype) -> Route:
        registry = self._session.registry
        entry = registry.parameters[name]
        if entry.numel == 0:
            return Route(entry, None, by_host=False)
        quantized = dtype in COMPRESSIBLE_DTYPES and not registry.codebooks[entry.codebook].is_exact
        # Horovod reduces every dtype that gradients have, except this one.
        if not quantized and dtype != torch.bfloat16:
            return Route(entry, None, by_host=True)
        slices = [Slice(name, 0, entry.numel, dtype, entry.codebook, entry.offset)]
        plan = MessagePlan.build(slices, registry.codebooks)
        return Route(entry, self._world.new_exchange(plan, name), by_host=False)
