"""The choice of exchange="auto" with clocks and links that the tests set."""

import json
from collections.abc import Mapping

import pytest
import torch

from hvd_qoda.cost_model import CodecSpeed, Link, Ranks
from hvd_qoda.scheme_choice import CHECK_EVERY, Costs, SchemeChoice, candidates
from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import MessagePlan, Slice
from tests.in_memory_transport import InMemoryGroup

SCHEMES = ("off", "allgather", "reduce_scatter")
CODEC = CodecSpeed(encode_s=2e-9, decode_s=1e-9, call_s=1e-5)
STEPS, SHORT = 6, 2  # of a trial, close predictions and others


def plans(*sizes: int) -> dict[str, MessagePlan]:
    books = {"body": Codebook.uniform(5)}
    return {
        f"p{index}": MessagePlan.build([Slice(f"p{index}", 0, size, torch.float32, "body", 0)], books)
        for index, size in enumerate(sizes)
    }


def costs(bytes_per_s: float, size: int = 2, latency_s: float = 1e-5) -> Costs:
    ranks = Ranks(size)
    return Costs(ranks, Link.of(ranks, latency_s, bytes_per_s, each_s=latency_s), CODEC)


class Clock:
    """Every rank's clock; a step takes what its scheme takes here."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self.seconds = dict(seconds)
        self.now = 0.0
        self.noise = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_step(self, scheme: str) -> None:
        self.now += self.seconds[scheme] + self.noise


class Rank:
    """One rank's choice, driven through steps."""

    def __init__(self, seconds: Mapping[str, float], measured: Costs, messages: Mapping[str, MessagePlan]) -> None:
        self.clock = Clock(seconds)
        self.choice = SchemeChoice(SCHEMES, clock=self.clock)
        self.measured = measured
        self.messages = messages
        self.asked = 0

    def measure(self) -> Costs:
        self.asked += 1
        return self.measured


def drive(ranks: list[Rank], steps: int) -> list[tuple[str, str | None]]:
    """Step all ranks; the scheme of message p0 and what was said, by step; asserts that ranks never differ."""
    group = InMemoryGroup(len(ranks))

    def run(transport: object) -> list[tuple[str, str | None]]:
        rank = ranks[transport.rank]  # type: ignore[attr-defined]
        seen = []
        for _ in range(steps):
            said = rank.choice.begin_step(transport, lambda: rank.messages, rank.measure)  # type: ignore[arg-type]
            scheme = rank.choice.scheme_for("p0")
            seen.append((scheme, said))
            rank.clock.pass_step(scheme)
        return seen

    results = group.run(run)
    assert all(result == results[0] for result in results)
    return results[0]


def test_candidates_are_the_best_few_predictions_and_off() -> None:
    slow = candidates(plans(1_000_000), costs(1e7), SCHEMES)
    assert [c.name for c in slow] == ["allgather", "reduce_scatter", "off"]
    assert slow[0].predicted_s < slow[1].predicted_s < slow[2].predicted_s
    assert [c.name for c in candidates({}, costs(1e7), SCHEMES)] == ["off"]
    fast = candidates(plans(1_000_000), costs(1e11), SCHEMES)
    assert [c.name for c in fast] == ["off"]


def test_mixed_takes_the_cheapest_scheme_for_each_message() -> None:
    messages = plans(1_000, 4_000_000)
    found = candidates(messages, costs(1.25e8, size=8, latency_s=3e-4), SCHEMES)
    mixed = next(c for c in found if c.name == "mixed")
    assert mixed.schemes["p1"] == "reduce_scatter"
    assert mixed.schemes["p0"] != "reduce_scatter"
    assert mixed.predicted_s < next(c for c in found if c.name == "off").predicted_s


def two_ranks(seconds: Mapping[str, float], bytes_per_s: float = 1e8) -> list[Rank]:
    ranks = [Rank(seconds, costs(bytes_per_s), plans(1_000_000)) for _ in range(2)]
    ranks[1].clock.now = 1234.5  # clocks of different machines
    return ranks


def test_prediction_first_then_the_shortest_steps() -> None:
    # Predicted: allgather first. Measured: reduce_scatter is faster.
    ranks = two_ranks({"off": 0.09, "allgather": 0.05, "reduce_scatter": 0.03})
    seen = drive(ranks, 40)
    schemes = [scheme for scheme, _ in seen]
    assert schemes[0] == "allgather"
    assert "predicted to cost least" in (seen[0][1] or "")
    names = [c["name"] for c in ranks[0].choice.state_dict()["candidates"]]  # type: ignore[index]
    trial = [name for name in names for _ in range(SHORT if name == "off" else STEPS)]
    assert schemes[3 : 3 + len(trial)] == trial
    said = seen[3 + len(trial)][1] or ""
    assert "switching from allgather to reduce_scatter" in said
    assert "allgather 50 ms" in said
    assert set(schemes[3 + len(trial) :]) == {"reduce_scatter"}
    assert [rank.asked for rank in ranks] == [1, 1]
    assert ranks[0].choice.settled


def test_off_is_kept_where_compressed_steps_are_longer() -> None:
    schemes = [scheme for scheme, _ in drive(two_ranks({"off": 0.02, "allgather": 0.05, "reduce_scatter": 0.06}), 40)]
    assert schemes[0] == "allgather"
    assert schemes[-1] == "off"


def test_the_better_prediction_stays_within_three_percent() -> None:
    seen = drive(two_ranks({"off": 0.0985, "allgather": 0.1, "reduce_scatter": 0.1}), 40)
    assert seen[-1][0] == "allgather"
    assert any("staying with allgather" in (said or "") for _, said in seen)


def test_one_rank_with_a_disturbed_clock_cannot_split_the_ranks() -> None:
    ranks = [
        Rank({"off": 0.09, "allgather": 0.05, "reduce_scatter": 0.07}, costs(1e8, size=3), plans(10**6))
        for _ in range(3)
    ]
    ranks[2].clock.seconds["allgather"] = 7.0
    assert drive(ranks, 40)[-1][0] == "allgather"


def test_it_is_checked_again_and_follows_what_has_changed() -> None:
    ranks = two_ranks({"off": 0.09, "allgather": 0.05, "reduce_scatter": 0.06})
    trial = 2 * STEPS + SHORT
    first = drive(ranks, 3 + trial + 1)
    assert first[-1][0] == "allgather"
    for rank in ranks:
        rank.clock.seconds["allgather"] = 0.2
    later = drive(ranks, CHECK_EVERY + trial)
    assert {scheme for scheme, _ in later[: CHECK_EVERY - 1]} == {"allgather"}
    assert later[-1][0] == "reduce_scatter"
    assert "switching from allgather to reduce_scatter" in (later[-1][1] or "")


def test_where_off_is_the_only_candidate_nothing_is_tried() -> None:
    seen = drive(two_ranks({"off": 0.02}, bytes_per_s=1e12), 60)
    assert {scheme for scheme, _ in seen} == {"off"}
    assert [said for _, said in seen if said is not None] == [seen[0][1]]


@pytest.mark.parametrize("steps", [2, 10, 40])
def test_a_restored_choice_goes_on_and_a_trial_begins_anew(steps: int) -> None:
    seconds = {"off": 0.09, "allgather": 0.05, "reduce_scatter": 0.03}
    ranks = two_ranks(seconds)
    drive(ranks, steps)
    states = [json.loads(json.dumps(rank.choice.state_dict())) for rank in ranks]
    assert states[0] == states[1]
    resumed = two_ranks(seconds)
    for rank, state in zip(resumed, states, strict=True):
        rank.choice.load_state_dict(state)
        assert rank.choice.state_dict() is not None
    seen = drive(resumed, 40)
    assert [rank.asked for rank in resumed] == [0, 0]
    assert seen[-1][0] == "reduce_scatter"
    if steps == 2:
        assert [scheme for scheme, _ in seen[:3]] == ["allgather"] * 3
        assert "trying" in (seen[1][1] or "")
    if steps == 10:
        assert "trying" in (seen[0][1] or "")
    if steps == 40:
        assert {scheme for scheme, _ in seen} == {"reduce_scatter"}


def test_other_numbers_of_ranks_choose_anew() -> None:
    ranks = two_ranks({"off": 0.09, "allgather": 0.05, "reduce_scatter": 0.03})
    drive(ranks, 5)
    state = ranks[0].choice.state_dict()
    three = [Rank(ranks[0].clock.seconds, costs(1e8, size=3), plans(10**6)) for _ in range(3)]
    for rank in three:
        rank.choice.load_state_dict(state)
    drive(three, 2)
    assert [rank.asked for rank in three] == [1, 1, 1]
    three[0].choice.load_state_dict(None)
    assert three[0].choice.state_dict() is None
