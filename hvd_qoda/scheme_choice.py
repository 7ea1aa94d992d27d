"""How `exchange="auto"` chooses: by prediction first, then by the times of real steps.

Before the first step the ranks measure the link and the codec (`hvd_qoda.measurement`), and the cost model predicts
what a step would cost with every scheme, and with the cheapest scheme for each message ("mixed"). The best few, and
"off" in any case, are then tried for some steps each, for fewer if they are predicted to be much slower; the one with
the shortest steps stays, and is checked against the others again after every `CHECK_EVERY` steps. Steps of a trial are
ordinary training: every scheme is unbiased, and all ranks hold the same bits. "fp16" is not among them: it rounds small
gradients to zero, turns those above 65,504 into infinities, and hosts without a GPU add 16-bit values slowly.

All ranks switch at the same step: when to try what follows from the number of steps, and what is fastest from times
that all ranks gather. But times differ from run to run, so the choice may. It is part of the state that is saved; a
trial that was under way then starts anew.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from hvd_qoda.cost_model import CodecSpeed, Layout, Link, Ranks, predict
from hvd_qoda.transport import Transport, all_gather_array
from qoda_kernels.layout import MessagePlan

__all__ = ["CHECK_EVERY", "Candidate", "Costs", "SchemeChoice", "candidates"]

CHECK_EVERY = 1000
"""Steps from one check to the next."""

_FIRST_TRIAL = 3  # the first steps compile kernels and make connections
_TRIAL_STEPS = 6
_SHORT_TRIAL_STEPS = 2  # of a candidate that is not predicted to be close: one that counts
_DISCARDED = 1  # of each trial: the first step with another scheme makes new buffers
_MOST_CANDIDATES = 3
_CLOSE = 1.5  # predictions within this factor of the best are worth a trial
_BETTER = 0.97  # a measured step time must be this much shorter to displace a better prediction


@dataclass(frozen=True)
class Costs:
    """What the ranks have measured."""

    ranks: Ranks
    link: Link
    codec: CodecSpeed


@dataclass(frozen=True)
class Candidate:
    """One way of exchanging all messages.

    Attributes:
        name: of the scheme, or "mixed".
        schemes: scheme of each message, by its name.
        predicted_s: seconds that it adds to a step.
    """

    name: str
    schemes: Mapping[str, str]
    predicted_s: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"name": self.name, "schemes": dict(self.schemes), "predicted_s": self.predicted_s}


def candidates(
    messages: Mapping[str, MessagePlan], costs: Costs, schemes: Sequence[str], mixed: bool = True
) -> list[Candidate]:
    """The ways worth trying, best prediction first; "off" is always among them.

    Args:
        messages: plans by name.
        costs: as measured.
        schemes: which ones are allowed, "off" included.
        mixed: whether different messages may have different schemes.
    """
    usable = costs.ranks.schemes if messages and costs.ranks.size > 1 else ("off",)
    schemes = [scheme for scheme in schemes if scheme in usable]
    layouts = {name: Layout.of([plan]) for name, plan in messages.items()}

    def share(layout: Layout, scheme: str) -> float:
        """Seconds of a message if all were like it."""
        count = len(layouts)
        alike = Layout(layout.elements * count, layout.raw_bytes * count, layout.message_bytes * count, count)
        return predict(scheme, alike, costs.ranks, costs.link, costs.codec).seconds

    cheapest = {name: min(schemes, key=partial(share, layout)) for name, layout in layouts.items()}
    found = [_candidate(scheme, dict.fromkeys(layouts, scheme), layouts, costs) for scheme in schemes]
    if mixed and len(set(cheapest.values())) > 1:
        found.append(_candidate("mixed", cheapest, layouts, costs))
    found.sort(key=lambda candidate: candidate.predicted_s)
    close = [c for c in found if c.predicted_s <= _CLOSE * found[0].predicted_s][:_MOST_CANDIDATES]
    if all(candidate.name != "off" for candidate in close):
        close = [*close[: _MOST_CANDIDATES - 1], *(c for c in found if c.name == "off")]
    return close


class SchemeChoice:
    """Holds the choice, and makes it anew when it is time.

    Args:
        schemes: which ones are allowed; "off" is one of them.
        name: what the names of its collectives begin with; the same on every rank.
        clock: seconds, of this rank.
    """

    def __init__(
        self, schemes: Sequence[str], name: str = "hvd_qoda.choice", clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._schemes = tuple(schemes)
        self._name = name
        self._clock = clock
        self._ranks: Ranks | None = None
        self._candidates: list[Candidate] = []
        self._current = 0
        self._best = 0
        self._count = 0  # steps that have begun since the choice was made
        self._check_at = 0  # the one of them with which the next trial begins
        self._began: float | None = None  # when the step under way did
        self._times: dict[int, list[float]] = {}  # of the trial, by candidate

    def begin_step(
        self,
        transport: Transport,
        messages: Callable[[], Mapping[str, MessagePlan]],
        measure: Callable[[], Costs],
        mixed: bool = True,
    ) -> str | None:
        """To be called on all ranks where a step begins; in some steps a collective call that waits.

        Args:
            transport: the ranks.
            messages: gives the plans of what is to be exchanged, by name; asked where a choice is to be made.
            measure: measures link and codec, the same on every rank; likewise.
            mixed: whether different messages may have different schemes.

        Returns:
            Where the schemes may have changed, one sentence that says why; else None.
        """
        now = self._clock()
        if self._ranks is None or self._ranks.size != transport.size:
            return self._predict(candidates(messages(), costs := measure(), self._schemes, mixed), costs.ranks)
        self._count += 1
        if self._began is not None and self._count > self._check_at:
            self._times.setdefault(self._current, []).append(now - self._began)
        self._began = now
        lengths = self._trial_lengths()
        starts = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
        if len(self._candidates) < 2 or self._count - self._check_at not in starts:
            return None
        tried = starts.index(self._count - self._check_at)
        if tried < len(self._candidates):
            self._current = tried
            return f"trying {self._candidates[tried].name} for {lengths[tried]} steps"
        return self._decide(transport)

    def scheme_for(self, message: str) -> str:
        """The scheme of a message in the step under way; "off" for one that was not there when the choice was made."""
        return self._candidates[self._current].schemes.get(message, "off")

    @property
    def settled(self) -> bool:
        """Whether a choice was made and no trial is under way or about to begin."""
        return self._ranks is not None and (len(self._candidates) < 2 or self._count < self._check_at - _FIRST_TRIAL)

    @property
    def chosen(self) -> Candidate | None:
        """What the step under way uses; None before the first one."""
        return self._candidates[self._current] if self._candidates else None

    def state_dict(self) -> dict[str, Any] | None:
        """The choice as plain values, equal on all ranks; None before there is one."""
        if self._ranks is None:
            return None
        return {
            "ranks": [self._ranks.size, self._ranks.local_size],
            "candidates": [candidate.to_dict() for candidate in self._candidates],
            "current": self._current,
            "best": self._best,
            "count": self._count,
            "check_at": self._check_at,
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on with a saved choice; with another number of ranks the next step makes a new one.

        A trial that was under way begins anew with the next step.
        """
        self._began, self._times = None, {}
        if state is None:
            self._ranks = None
            return
        self._ranks = Ranks(*state["ranks"])
        self._candidates = [Candidate(**candidate) for candidate in state["candidates"]]
        self._current, self._best = int(state["current"]), int(state["best"])
        self._count, self._check_at = int(state["count"]), int(state["check_at"])
        if self._check_at <= self._count:
            self._check_at = self._count + 1

    def _trial_lengths(self) -> list[int]:
        """Steps for which each candidate is tried."""
        close = _CLOSE * self._candidates[0].predicted_s
        return [_TRIAL_STEPS if c.predicted_s <= close else _SHORT_TRIAL_STEPS for c in self._candidates]

    def _predict(self, found: list[Candidate], ranks: Ranks) -> str:
        self._ranks = ranks
        self._candidates = found
        self._current = self._best = 0
        self._count, self._check_at = 0, _FIRST_TRIAL
        self._began, self._times = self._clock(), {}
        predicted = ", ".join(f"{c.name} {1e3 * c.predicted_s:.3g} ms" for c in self._candidates)
        return f"{self._candidates[0].name} is predicted to cost least ({predicted} in a step)"

    def _decide(self, transport: Transport) -> str:
        """Keep the candidate whose steps were the shortest."""
        own = [median(self._times[index][_DISCARDED:]) for index in range(len(self._candidates))]
        all_ranks = all_gather_array(transport, np.array(own), f"{self._name}.times")
        seconds = [float(value) for value in np.median(all_ranks, axis=0)]
        best = self._best
        for index in range(len(seconds)):
            if seconds[index] < _BETTER * seconds[best]:
                best = index
        before, self._best, self._current = self._candidates[self._best].name, best, best
        self._times, self._check_at = {}, self._count + CHECK_EVERY
        measured = ", ".join(
            f"{c.name} {1e3 * taken:.3g} ms" for c, taken in zip(self._candidates, seconds, strict=True)
        )
        name = self._candidates[best].name
        verdict = f"staying with {name}" if name == before else f"switching from {before} to {name}"
        return f"{verdict}; steps have taken {measured}"


def _candidate(name: str, schemes: Mapping[str, str], layouts: Mapping[str, Layout], costs: Costs) -> Candidate:
    coding = sending = 0.0
    for scheme in dict.fromkeys(schemes.values()):
        together = sum((layouts[key] for key, own in schemes.items() if own == scheme), start=Layout(0, 0, 0, 0))
        work = predict(scheme, together, costs.ranks, costs.link, costs.codec)
        coding, sending = coding + work.coding_s, sending + work.sending_s
    return Candidate(name, schemes, costs.codec.beside(coding, sending, max(1, len(schemes))))
