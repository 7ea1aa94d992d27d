"""When the levels of adaptive codebooks change, and from what.

In the steps before an update every rank gathers statistics of its own gradients. At the end of each such step the ranks
exchange them and all add them up, in rank order and in float64; so between steps every rank holds the same statistics
(one rank's checkpoint serves all), and at the beginning of a step of U every rank computes the same levels from them
(QODA, arXiv 2505.14371, step 1). That they are the same is checked: `LevelUpdates.begin_step` compares digests.

Rotated buckets have levels that never change. Where their bits are planned, the statistics are three numbers a layer.

Not every step need begin by itself: while gradients of another step are still under way, levels cannot change. What was
due at such a step is made up for by the next one that begins.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from hvd_qoda.agreement import check_agreement
from hvd_qoda.config import UpdateLevels
from hvd_qoda.transport import Transport, all_gather_array
from qoda_kernels.errors import RegistryError, WireError
from qoda_kernels.registry import CodebookRegistry, LearntFrom
from qoda_kernels.statistics import ExchangedStatistics, HistogramStatistics, TruncatedNormalStatistics

__all__ = ["LevelMark", "LevelUpdates"]

_OF_A_KIND = (HistogramStatistics, TruncatedNormalStatistics)  # those that the schedule chooses between


@dataclass(frozen=True)
class LevelMark:
    """Where level updates stand; see `LevelUpdates.mark`.

    Attributes:
        merged: by codebook key, the statistics since the last update.
        begun: the last step that has begun.
    """

    merged: Mapping[str, ExchangedStatistics]
    begun: int


class LevelUpdates:
    """Gathers statistics and updates levels on schedule.

    Args:
        schedule: when, and which statistics.
        registry: the model's codebooks, as training starts.
        learns: whether anything is to be learnt; not where nothing is ever quantized.
    """

    def __init__(self, schedule: UpdateLevels, registry: CodebookRegistry, learns: bool = True) -> None:
        self._schedule = schedule
        self._keys = registry.adaptive_keys if learns else ()
        self._statistics: dict[str, type[ExchangedStatistics]] = {
            key: registry.statistics_class(key, schedule.statistics) for key in self._keys
        }
        self._merged: dict[str, ExchangedStatistics] = {}  # the same on every rank
        self._own: dict[str, ExchangedStatistics] = {}  # of this rank in this step, by parameter
        self._learnt: dict[str, ExchangedStatistics] = {}  # from what the last update has made levels
        self._begun = 0  # the last step that has begun
        self._asked_step, self._asked_gathers = 0, False

    def begin_step(
        self,
        step: int,
        registry: CodebookRegistry,
        transport: Transport,
        described: Callable[[CodebookRegistry], Mapping[str, Any]] = lambda registry: {},
    ) -> CodebookRegistry:
        """The codebooks for a step, counted from 1: updated ones if the schedule says so.

        An update is also made if it was due at a step since the last one that began.

        Args:
            step: its number.
            registry: the codebooks of the step before.
            transport: the ranks.
            described: what else they are to agree on about updated codebooks.

        Raises:
            RankMismatchError: if the ranks have computed different levels, or differ in what is described.
        """
        due = any(self._schedule.is_due(each) for each in range(self._begun + 1, step + 1))
        self._begun = step
        if not self._keys or not due:
            return registry
        usable = {key: merged for key, merged in self._merged.items() if merged.squared_norm > 0.0}
        self._merged = {}
        if not usable:
            return registry
        # Each is of the class that `_statistics` names for its codebook.
        self._learnt = usable
        updated = registry.updated(cast(Mapping[str, LearntFrom], usable))
        levels = {f"levels at step {step}": updated.describe()["codebooks"]}
        check_agreement(transport, {**levels, **described(updated)}, "hvd_qoda.levels")
        return updated

    def take_learnt(self) -> dict[str, ExchangedStatistics]:
        """By codebook key, the statistics from which levels were made in this step; once, then forgotten."""
        learnt, self._learnt = self._learnt, {}
        return learnt

    def wants(self, step: int, key: str) -> bool:
        """Whether gradients of this codebook are to be gathered in this step."""
        if step != self._asked_step:  # asked for every gradient
            self._asked_step, self._asked_gathers = step, self._schedule.gathers(step)
        return self._asked_gathers and key in self._keys

    def gather(self, parameter: str, values: torch.Tensor, registry: CodebookRegistry) -> None:
        """Read one gradient of this rank, or a part of one; what is read of a parameter in one step adds up.

        Args:
            parameter: name of the parameter.
            values: contiguous 1-D tensor. Read on the CPU, whose sums do not depend on who codes the gradients.
            registry: the codebooks of this step.
        """
        key = registry.parameters[parameter].codebook
        codebook = registry.codebooks[key]
        norm = registry.settings[key].norm  # a codebook that was chosen may have another one
        read = self._statistics[key].gather(values.cpu().float().numpy(), codebook.bucket_size, norm)
        self._own[parameter] = self._own[parameter].merge(read) if parameter in self._own else read

    def end_step(self, step: int, registry: CodebookRegistry, transport: Transport) -> None:
        """Exchange and add up what has been gathered since a step began; a collective call that waits.

        It does so only if one of the steps from that one to `step` belongs to the samples.
        """
        own, self._own = self._own, {}
        if not self._keys or not any(self._schedule.gathers(each) for each in range(self._begun, step + 1)):
            return
        # In the model's order: hooks run in another order on every rank and in every run.
        parts: dict[str, list[ExchangedStatistics]] = {key: [] for key in self._keys}
        for name, entry in registry.parameters.items():
            if name in own:
                parts[entry.codebook].append(own[name])
        arrays = [self._statistics[key].merge_in_order(parts[key]).to_array() for key in self._keys]
        ends = np.cumsum([array.size for array in arrays])
        for array in all_gather_array(transport, np.concatenate(arrays), "hvd_qoda.statistics"):
            for key, part in zip(self._keys, np.split(array, ends[:-1]), strict=True):
                received = self._statistics[key].from_array(part)
                self._merged[key] = self._merged[key].merge(received) if key in self._merged else received

    def abandon_step(self) -> None:
        """Forget what this step has gathered."""
        self._own = {}

    def mark(self) -> LevelMark:
        """Where the updates stand between two steps, for `state_dict`; cheap."""
        return LevelMark(dict(self._merged), self._begun)

    def state_dict(self, mark: LevelMark | None = None) -> dict[str, Any]:
        """The statistics since the last update and the last step that began, as plain values; equal on all ranks.

        Args:
            mark: tells of the time when it was made; by default of now.
        """
        mark = self.mark() if mark is None else mark
        return {
            "statistics": self._schedule.statistics,
            "merged": {key: merged.to_array().tolist() for key, merged in mark.merged.items()},
            "begun": mark.begun,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s values; statistics of another kind, or of codebooks that do not adapt, are dropped.

        Raises:
            RegistryError: for statistics from which a codebook does not learn; nothing is restored then.
        """
        same_kind = state["statistics"] == self._schedule.statistics
        self._merged = {
            key: self._restored(key, array)
            for key, array in state["merged"].items()
            if key in self._keys and (same_kind or self._statistics[key] not in _OF_A_KIND)
        }
        self._own = {}
        self._begun = int(state["begun"])

    def _restored(self, key: str, array: Sequence[float]) -> ExchangedStatistics:
        try:
            return self._statistics[key].from_array(np.array(array, dtype=np.float64))
        except WireError as error:
            raise RegistryError(
                f"the state holds statistics from which the codebook {key!r} does not learn ({error}); another version "
                'may have saved it. To go on without them, set state["levels"]["merged"] to {} on every rank: the next '
                "update then learns from the samples that are still to come before it"
            ) from error
