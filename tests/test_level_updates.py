"""Statistics and levels over several ranks of one process."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from hvd_qoda.config import QodaConfig
from hvd_qoda.errors import RankMismatchError
from hvd_qoda.level_updates import LevelUpdates
from qoda_kernels.errors import RegistryError
from qoda_kernels.levels import minimum_variance_levels
from qoda_kernels.magnitudes import MagnitudeStatistics
from qoda_kernels.registry import CodebookRegistry
from qoda_kernels.statistics import HistogramStatistics, NormStatistics
from qoda_kernels.tails import TailSettings, learnt_truncation
from tests.in_memory_transport import InMemoryGroup

SIZES = {"one.weight": 3000, "two.weight": 5000}
SCHEDULE = {"at": (4,), "every": None, "samples": 2}


def configuration(**keywords: Any) -> QodaConfig:
    one_type = [{"name": "*", "as_type": "feed_forward"}]
    return QodaConfig(**{"update_levels": SCHEDULE, "levels": "adaptive", "layers": one_type, **keywords})


def registry_of(config: QodaConfig) -> CodebookRegistry:
    return config.build_registry([(name, torch.zeros(size // 50, 50)) for name, size in SIZES.items()])


def gradient(name: str, rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * rank + 10 * step + len(name))
    return (
        torch.randn(SIZES[name], generator=generator) * (1 + rank) * torch.rand(SIZES[name], generator=generator) ** 3
    )


def run_steps(
    updates: LevelUpdates, registry: CodebookRegistry, transport: Any, steps: range, order: int = 1
) -> CodebookRegistry:
    for step in steps:
        registry = updates.begin_step(step, registry, transport)
        for name in list(SIZES)[::order]:
            if updates.wants(step, registry.parameters[name].codebook):
                updates.gather(name, gradient(name, transport.rank, step), registry)
        updates.end_step(step, registry, transport)
    return registry


def test_levels_are_those_of_all_ranks_samples() -> None:
    config = configuration()
    start = registry_of(config)
    learnt: list[dict[str, Any]] = []

    def train(transport: Any) -> CodebookRegistry:
        order = 1 if transport.rank == 0 else -1  # hooks fire in another order on every rank
        updates = LevelUpdates(config.update_levels, start)
        trained = run_steps(updates, start, transport, range(1, 5), order)
        learnt.append(updates.take_learnt())
        assert updates.take_learnt() == {}
        return trained

    registries = InMemoryGroup(3).run(train)
    assert all(registry.digest == registries[0].digest for registry in registries)
    assert registries[0].version == 1
    (key,) = start.adaptive_keys
    everything = HistogramStatistics.empty()
    for step in (2, 3):  # the two steps before step 4
        for rank in range(3):
            parts = [HistogramStatistics.gather(gradient(name, rank, step).numpy(), 512, "max") for name in SIZES]
            everything = everything.merge(HistogramStatistics.merge_in_order(parts))
    np.testing.assert_allclose([found[key].to_array() for found in learnt], [everything.to_array()] * 3)
    wanted = minimum_variance_levels(everything, 5, previous=start.codebooks[key].levels)
    np.testing.assert_allclose(registries[0].codebooks[key].levels, wanted, rtol=1e-6)


def test_steps_without_samples_exchange_nothing() -> None:
    config = configuration()
    start = registry_of(config)
    group = InMemoryGroup(2)
    group.run(lambda t: run_steps(LevelUpdates(config.update_levels, start), start, t, range(1, 2)))
    assert all(transport.meter.traffic.sent_bytes == 0 for transport in group.transports)


def test_fixed_levels_never_change() -> None:
    config = configuration(levels="uniform")
    start = registry_of(config)
    group = InMemoryGroup(2)
    after = group.run(lambda t: run_steps(LevelUpdates(config.update_levels, start), start, t, range(1, 9)))
    assert after == [start, start]
    assert all(transport.meter.traffic.sent_bytes == 0 for transport in group.transports)


def test_no_gradients_no_update() -> None:
    config = configuration()
    start = registry_of(config)

    def train(transport: Any) -> CodebookRegistry:
        updates = LevelUpdates(config.update_levels, start)
        for step in range(1, 5):
            registry = updates.begin_step(step, start, transport)
            if step == 2:
                updates.gather("one.weight", torch.zeros(3000), start)
            updates.end_step(step, start, transport)
        return registry

    assert InMemoryGroup(2).run(train) == [start, start]


def test_abandoned_steps_leave_no_statistics() -> None:
    config = configuration()
    start = registry_of(config)

    def train(transport: Any) -> dict[str, Any]:
        updates = LevelUpdates(config.update_levels, start)
        run_steps(updates, start, transport, range(2, 3))
        updates.gather("one.weight", torch.ones(3000), start)
        updates.abandon_step()
        before = updates.state_dict()
        updates.end_step(1, start, transport)
        assert updates.state_dict() == before
        return before

    group = InMemoryGroup(2)
    states = group.run(train)
    assert states[0] == states[1]


@pytest.mark.parametrize("kind", ["histogram", "truncated_normal"])
def test_state_goes_through_json_exactly(kind: str) -> None:
    config = configuration(update_levels={**SCHEDULE, "statistics": kind})
    start = registry_of(config)

    def train(transport: Any) -> tuple[bytes, bytes, str]:
        whole = LevelUpdates(config.update_levels, start)
        uninterrupted = run_steps(whole, start, transport, range(1, 5))
        first = LevelUpdates(config.update_levels, start)
        run_steps(first, start, transport, range(1, 3))
        text = json.dumps(first.state_dict())
        second = LevelUpdates(config.update_levels, start)
        second.load_state_dict(json.loads(text))
        return uninterrupted.digest, run_steps(second, start, transport, range(3, 5)).digest, text

    for uninterrupted, resumed, text in InMemoryGroup(2).run(train):
        assert resumed == uninterrupted != start.digest
        assert json.loads(text)["merged"]


def test_statistics_of_another_kind_are_dropped_on_loading() -> None:
    config = configuration()
    start = registry_of(config)
    updates = LevelUpdates(config.update_levels, start)
    updates.load_state_dict({"statistics": "truncated_normal", "merged": {"feed_forward": [0.0] * 5}, "begun": 3})
    assert updates.state_dict()["merged"] == {}


def test_statistics_from_which_a_codebook_does_not_learn_are_refused_by_name() -> None:
    """A state of a version that planned the bits of rotated buckets from histograms."""
    config = auto_configuration(rotation="hadamard", auto_bits={"reference": 4})
    start = config.build_registry([(name, torch.zeros(size // 50, 50)) for name, size in AUTO_SIZES.items()])
    updates = LevelUpdates(config.update_levels, start)
    histogram = HistogramStatistics.empty().to_array().tolist()
    state = {"statistics": "histogram", "merged": dict.fromkeys(start.adaptive_keys, histogram), "begun": 3}
    before = updates.state_dict()
    key = start.adaptive_keys[0]
    with pytest.raises(RegistryError, match=rf'codebook {key!r} does not learn.*set state\["levels"\]\["merged"\] to'):
        updates.load_state_dict(state)
    assert updates.state_dict() == before
    updates.load_state_dict({**state, "merged": {}})
    assert updates.state_dict() == {**before, "begun": 3}


@pytest.mark.parametrize("resumed", [False, True])
def test_an_update_due_while_no_step_could_begin_is_made_up_for(resumed: bool) -> None:
    """Steps 3 and 4 overlap: what was gathered in 3 counts, and the update due at 4 happens at 5, once."""
    config = configuration()
    start = registry_of(config)

    def train(transport: Any) -> list[bytes]:
        updates = LevelUpdates(config.update_levels, start)
        registry = run_steps(updates, start, transport, range(1, 3))
        registry = updates.begin_step(3, registry, transport)
        for name in SIZES:
            assert updates.wants(3, registry.parameters[name].codebook)
            updates.gather(name, gradient(name, transport.rank, 3), registry)
        updates.end_step(4, registry, transport)
        if resumed:
            state = json.loads(json.dumps(updates.state_dict()))
            updates = LevelUpdates(config.update_levels, start)
            updates.load_state_dict(state)
        digests = [registry.digest]
        for step in (5, 6):
            registry = run_steps(updates, registry, transport, range(step, step + 1))
            digests.append(registry.digest)
        return digests

    def in_time(transport: Any) -> bytes:
        return run_steps(LevelUpdates(config.update_levels, start), start, transport, range(1, 5)).digest

    group = InMemoryGroup(2)
    wanted = group.run(in_time)[0]
    assert group.run(train) == [[start.digest, wanted, wanted]] * 2


def test_ranks_that_compute_other_levels_find_out() -> None:
    config = configuration()
    start = registry_of(config)

    def train(transport: Any) -> str:
        updates = LevelUpdates(config.update_levels, start)
        run_steps(updates, start, transport, range(1, 4))
        if transport.rank == 1:
            for key, merged in updates._merged.items():
                updates._merged[key] = merged.merge(merged.gather(np.arange(512, dtype=np.float32), 512, "max"))
        try:
            updates.begin_step(4, start, transport)
        except RankMismatchError as error:
            return str(error)
        return ""

    for message in InMemoryGroup(2).run(train):
        assert "levels at step 4: feed_forward: levels" in message


def test_codebooks_that_clip_learn_from_all_ranks_magnitudes() -> None:
    config = configuration(levels="tnq", bits=4, tails={"optimum": "bound"})
    start = registry_of(config)
    (key,) = start.adaptive_keys
    assert start.codebooks[key].clip == 0.0  # nothing is known yet: norms

    def train(transport: Any) -> tuple[CodebookRegistry, dict[str, Any]]:
        updates = LevelUpdates(config.update_levels, start)
        middle = run_steps(updates, start, transport, range(1, 4))
        resumed = LevelUpdates(config.update_levels, start)
        resumed.load_state_dict(json.loads(json.dumps(updates.state_dict())))
        through = [run_steps(each, middle, transport, range(4, 5)) for each in (updates, resumed)]
        assert through[0].digest == through[1].digest
        return through[0], through[0].state_dict()

    results = InMemoryGroup(3).run(train)
    assert all(registry.digest == results[0][0].digest for registry, _ in results)
    everything = [gradient(name, rank, step).numpy() for name in SIZES for step in (2, 3) for rank in range(3)]
    wanted, _ = learnt_truncation(
        MagnitudeStatistics.gather(np.concatenate(everything)), "tnq", 4, TailSettings(optimum="bound")
    )
    learnt = results[0][0].codebooks[key]
    assert learnt.clip == pytest.approx(wanted.clip, rel=1e-6)
    np.testing.assert_allclose(learnt.levels, wanted.levels, rtol=1e-5)
    assert start.restored(results[0][1]).codebooks[key] == learnt


def test_schemes_may_differ_by_layer_type() -> None:
    layers = [
        {"name": "one.weight", "as_type": "feed_forward", "levels": "tuq"},
        {"name": "two.weight", "as_type": "attention", "levels": "adaptive"},
    ]
    config = configuration(layers=layers)
    start = registry_of(config)
    after = InMemoryGroup(2).run(lambda t: run_steps(LevelUpdates(config.update_levels, start), start, t, range(1, 5)))
    assert after[0].digest == after[1].digest
    assert after[0].codebooks["feed_forward"].clip > 0.0
    assert after[0].codebooks["attention"].clip == 0.0
    assert after[0].codebooks["attention"].version == 1


AUTO_SIZES = {"a.weight": 4000, "b.weight": 20000, "c.weight": 8000, "d.weight": 3000}
AUTO_SCALES = {"a.weight": 30.0, "b.weight": 1.0, "c.weight": 1e-3, "d.weight": 5.0}


def auto_run(config: QodaConfig, ranks: int = 3) -> tuple[CodebookRegistry, list[CodebookRegistry]]:
    """Registries before and after one plan on every rank; the layers' gradients have very different sizes."""
    start = config.build_registry([(name, torch.zeros(size // 50, 50)) for name, size in AUTO_SIZES.items()])

    def train(transport: Any) -> CodebookRegistry:
        updates, registry = LevelUpdates(config.update_levels, start), start
        for step in range(1, 5):
            registry = updates.begin_step(step, registry, transport)
            for name, size in AUTO_SIZES.items():
                if updates.wants(step, registry.parameters[name].codebook):
                    generator = torch.Generator().manual_seed(100 * transport.rank + step)
                    updates.gather(name, AUTO_SCALES[name] * torch.randn(size, generator=generator), registry)
            updates.end_step(step, registry, transport)
        return registry

    return start, InMemoryGroup(ranks).run(train)


def auto_configuration(**keywords: Any) -> QodaConfig:
    return QodaConfig(**{"update_levels": SCHEDULE, "bits": "auto", "codebooks": "per_layer", **keywords})


def sent_bits(registry: CodebookRegistry) -> int:
    return sum(entry.numel * registry.codebooks[entry.codebook].bits for entry in registry.parameters.values())


@pytest.mark.parametrize(
    "scheme",
    [
        {"levels": "adaptive"},
        {"levels": "uniform"},
        {"levels": "tnq"},
        {"rotation": "hadamard", "rounding": "nearest"},
        {"rotation": "hadamard"},
        {"levels": "best", "rounding": "nearest"},
    ],
)
def test_bits_are_planned_alike_on_all_ranks_within_the_variance_budget(scheme: dict[str, str]) -> None:
    start, after = auto_run(auto_configuration(**scheme, auto_bits={"reference": 4}))
    assert start.restored(after[0].state_dict()).digest == after[0].digest
    assert all(registry.digest == after[0].digest for registry in after)
    assert {book.bits for book in start.codebooks.values()} == {4}
    bits = {name: after[0].codebooks[entry.codebook].bits for name, entry in after[0].parameters.items()}
    assert len(after[0].codebooks) == 4  # one each
    assert bits["c.weight"] == 2  # its error does not matter
    assert bits["a.weight"] > bits["b.weight"]
    assert sent_bits(after[0]) < 0.8 * sent_bits(start)


@pytest.mark.parametrize("scheme", [{"rotation": "hadamard"}, {"rotation": "hadamard", "rounding": "nearest"}])
def test_bits_of_rotated_buckets_are_planned_from_norms(scheme: dict[str, str]) -> None:
    """The plan is that of histograms, and goes through a checkpoint; what the ranks send is three numbers a layer."""
    config = auto_configuration(**scheme, auto_bits={"reference": 4})
    names = [(name, torch.zeros(size // 50, 50)) for name, size in AUTO_SIZES.items()]
    start = config.build_registry(names)
    sample = {name: torch.randn(size, generator=torch.Generator().manual_seed(3)) for name, size in AUTO_SIZES.items()}

    def gather(updates: LevelUpdates, registry: CodebookRegistry, rank: int) -> None:
        for name, values in sample.items():
            updates.gather(name, AUTO_SCALES[name] * (1 + rank) * values, registry)

    def train(transport: Any) -> tuple[CodebookRegistry, CodebookRegistry, int]:
        updates = LevelUpdates(config.update_levels, start)
        registry = updates.begin_step(2, start, transport)
        gather(updates, registry, transport.rank)
        updates.end_step(2, registry, transport)
        sent = transport.meter.traffic.sent_bytes
        resumed = LevelUpdates(config.update_levels, start)
        resumed.load_state_dict(json.loads(json.dumps(updates.state_dict())))
        return updates.begin_step(4, registry, transport), resumed.begin_step(4, registry, transport), sent

    results = InMemoryGroup(2).run(train)
    histograms = {
        key: HistogramStatistics.merge_in_order(
            [
                HistogramStatistics.gather(
                    (AUTO_SCALES[entry.name] * (1 + rank) * sample[entry.name]).numpy(), 512, "max"
                )
                for rank in range(2)
                for entry in start.parameters.values()
                if entry.codebook == key
            ]
        )
        for key in start.adaptive_keys
    }
    wanted = start.updated(histograms).digest
    for planned, resumed, sent in results:
        assert planned.digest == resumed.digest == wanted != start.digest
        assert sent <= 2 * 3 * 8 * len(AUTO_SIZES)


def test_norms_are_too_little_for_levels_that_learn() -> None:
    start = registry_of(configuration())
    with pytest.raises(RegistryError, match="cannot learn from NormStatistics"):
        start.updated({start.adaptive_keys[0]: NormStatistics(1.0, 1)})


def test_the_byte_budget_is_kept() -> None:
    start, after = auto_run(auto_configuration(auto_bits={"budget": "bytes", "reference": 4}))
    assert 0.9 * sent_bits(start) < sent_bits(after[0]) <= sent_bits(start)
    bits = {name: after[0].codebooks[entry.codebook].bits for name, entry in after[0].parameters.items()}
    assert bits["a.weight"] >= bits["d.weight"] > bits["b.weight"] > bits["c.weight"]


def test_bounds_and_fixed_bits_are_respected() -> None:
    layers = [
        {"name": "a.*", "max_bits": 5},
        {"name": "b.*", "bits": 7},
        {"name": "c.*", "min_bits": 6},
        {"name": "d.*", "bits": 32},
    ]
    start, after = auto_run(auto_configuration(layers=layers, auto_bits={"reference": 5}))
    bits = {name: after[0].codebooks[entry.codebook].bits for name, entry in after[0].parameters.items()}
    assert bits == {"a.weight": 5, "b.weight": 7, "c.weight": 6, "d.weight": 32}
    assert after[0].codebooks[start.parameters["b.weight"].codebook].version == 1  # its levels follow all the same
    # What a run has planned comes back; a run that plans within other bounds is another configuration.
    assert start.restored(json.loads(json.dumps(after[0].state_dict()))).digest == after[0].digest
    other = auto_configuration(layers=[{"name": "a.*", "max_bits": 6}, *layers[1:]], auto_bits={"reference": 5})
    sizes = [(name, torch.zeros(size // 50, 50)) for name, size in AUTO_SIZES.items()]
    with pytest.raises(RegistryError, match="widths"):
        other.build_registry(sizes).restored(after[0].state_dict())


def test_a_budget_that_bounds_do_not_allow_is_exceeded_as_little_as_possible() -> None:
    _, after = auto_run(auto_configuration(auto_bits={"reference": 8, "max_bits": 4}))
    assert {book.bits for book in after[0].codebooks.values()} == {4}
