"""Gradients of any dtype, shape and layout."""

from typing import Any

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_qoda.errors import UnsupportedError
from hvd_qoda.horovod.gradient_index import GradientIndex
from tests.horovod.training import assert_gradients, bits_of, gather, gradients, make_optimizer, make_qoda
from tests.launcher import RankPool

SCHEMES = ("allgather", "reduce_scatter")


class Bag(nn.Module):
    """Parameters of chosen shapes whose gradients are chosen by the test."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def loss(self, wanted: dict[str, torch.Tensor]) -> torch.Tensor:
        """A loss whose gradients are the wanted ones."""
        terms = [(parameter * wanted[name]).sum().float() for name, parameter in self.named_parameters()]
        return torch.stack(terms).sum()


def exchange_bag(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, scheme: str, op: str = "Average", **keywords: Any
) -> dict[str, torch.Tensor]:
    """Exchange random gradients of these shapes, check them, and return them."""
    model = Bag({name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()})
    compressor = make_qoda(model, exchange=scheme, **keywords)
    optimizer = make_optimizer(model, compressor, op=getattr(hvd, op))
    for step in range(2):
        generator = torch.Generator().manual_seed(100 * step + hvd.rank())
        wanted = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        optimizer.zero_grad()
        model.loss(wanted).backward()
        optimizer.synchronize()
        scale = hvd.size() if op == "Sum" else 1.0
        if dtype == torch.float32 or op == "Average":
            assert_gradients(model, compressor, wanted, scale)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert (parameter.grad.shape, parameter.grad.dtype) == (torch.Size(shapes[name]), dtype)
            mean = sum(part.float() for part in gather(wanted[name], name)) / hvd.size() * scale
            if mean.numel():
                error = (parameter.grad.float() - mean).abs().max()
                assert error <= 0.4 * scale * 4, name  # two gaps of 1/15 of a bucket's largest value, which is below 6
        with optimizer.skip_synchronize():
            optimizer.step()
    return gradients(model)


def same_on_all(results: list[dict[str, torch.Tensor]]) -> None:
    for other in results[1:]:
        assert bits_of(other.values()) == bits_of(results[0].values())


ODD_SHAPES = {
    "scalar": (),
    "one": (1,),
    "empty": (0,),
    "empty_matrix": (5, 0),
    "tiny": (3,),
    "vector": (1500,),
    "odd": (37, 41),
    "huge": (300, 401),
    "tiny_again": (2, 2),
    "four": (4, 3, 11, 13),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("min_numel", [0, 1024])
def test_any_shape_mixed_small_huge_small(four_ranks: RankPool, scheme: str, min_numel: int) -> None:
    rules = [{"name": "*", "bits": 5}] if min_numel == 0 else []
    same_on_all(four_ranks.run(exchange_bag, ODD_SHAPES, torch.float32, scheme, min_numel=min_numel, layers=rules))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", ["Average", "Sum"])
def test_16_bit_gradients(two_ranks: RankPool, scheme: str, dtype: torch.dtype, op: str) -> None:
    shapes = {"small": (30,), "large": (64, 65)}
    same_on_all(two_ranks.run(exchange_bag, shapes, dtype, scheme, op))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_horovod_bfloat16_that_is_not_compressed_travels_as_bytes(four_ranks: RankPool, scheme: str) -> None:
    results = four_ranks.run(exchange_bag, {"large": (64, 65)}, torch.bfloat16, scheme, bits=32)
    same_on_all(results)


def float64_is_horovods_own(op: str) -> None:
    generator = torch.Generator().manual_seed(hvd.rank())
    own = torch.randn(64, 65, generator=generator, dtype=torch.float64)
    model = Bag({"large": torch.zeros(64, 65, dtype=torch.float64)})
    compressor = make_qoda(model)
    optimizer = make_optimizer(model, compressor, op=getattr(hvd, op))
    model.large.grad = own.clone()
    optimizer.synchronize()
    assert torch.equal(model.large.grad, hvd.allreduce(own, op=getattr(hvd, op), name="float64"))
    assert "all_to_all" not in compressor.traffic.calls
    assert compressor.traffic.calls["all_reduce"] <= 2  # the gradient, and a roll call before the agreement


@pytest.mark.parametrize("op", ["Average", "Sum"])
def test_horovod_float64_passes_through(two_ranks: RankPool, op: str) -> None:
    two_ranks.run(float64_is_horovods_own, op)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_all_code_widths(two_ranks: RankPool, bits: int) -> None:
    same_on_all(two_ranks.run(all_widths, bits))


def all_widths(bits: int) -> dict[str, torch.Tensor]:
    model = Bag({"weight": torch.zeros(50, 60)})
    compressor = make_qoda(model, bits=bits, bucket_size=256, norm="l2", norm_format="bf16", levels="exponential")
    optimizer = make_optimizer(model, compressor)
    own = {"weight": torch.randn(50, 60, generator=torch.Generator().manual_seed(hvd.rank()))}
    model.loss(own).backward()
    optimizer.synchronize()
    assert_gradients(model, compressor, own)
    return gradients(model)


def with_layouts() -> None:
    """Gradients that are not contiguous: channels last, transposed, expanded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3)).to(memory_format=torch.channels_last)
    compressor = make_qoda(model)
    optimizer = make_optimizer(model, compressor)
    weight = model[1].weight
    generator = torch.Generator().manual_seed(hvd.rank())
    layouts = {
        "channels_last": torch.randn(16, 16, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 3, 16, 16, generator=generator).permute(3, 2, 1, 0),
        "expanded": torch.randn(16, 1, 1, 1, generator=generator).expand(16, 16, 3, 3),
    }
    for name, layout in layouts.items():
        own = {key: torch.zeros_like(p) for key, p in model.named_parameters()}
        own["1.weight"] = layout.clone()
        for key, parameter in model.named_parameters():
            parameter.grad = layout if parameter is weight else own[key].clone()
        assert not weight.grad.is_contiguous(), name
        optimizer.synchronize()
        assert_gradients(model, compressor, own)
        optimizer.zero_grad()


def test_non_contiguous_gradients(two_ranks: RankPool) -> None:
    two_ranks.run(with_layouts)


def with_special_values(scheme: str) -> None:
    """Zeros stay exact; a NaN or infinity of one rank reaches every rank, in its bucket and nowhere else."""
    model = Bag({"weight": torch.zeros(40, 128)})
    compressor = make_qoda(model, exchange=scheme, bucket_size=128)
    optimizer = make_optimizer(model, compressor)
    own = torch.randn(40, 128, generator=torch.Generator().manual_seed(hvd.rank()))
    own[3] = 0.0
    if hvd.rank() == 1:
        own[7, 5] = float("nan")
        own[9, 100] = float("inf")
    model.weight.grad = own.clone()
    optimizer.synchronize()
    found = model.weight.grad
    finite = torch.isfinite(found).all(dim=1)
    assert [row for row in range(40) if not finite[row]] == [7, 9]
    assert (found[3] == 0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_non_finite_values_stay_in_their_bucket(two_ranks: RankPool, scheme: str) -> None:
    two_ranks.run(with_special_values, scheme)


class Embeddings(nn.Module):
    """Two tables of equal shape, one of another, and a matrix of the first's shape; all sparse but the last."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Embedding(90, 32, sparse=sparse)
        self.two = nn.Embedding(90, 32, sparse=sparse)
        self.other = nn.Embedding(70, 32, sparse=sparse)
        self.matrix = nn.Parameter(torch.randn(90, 32))

    def loss(self, step: int, used: str = "abc") -> torch.Tensor:
        generator = torch.Generator().manual_seed(10 * step + hvd.rank())
        indices = torch.randint(0, 70, (20,), generator=generator)
        total = (self.matrix * self.matrix).sum()
        if "a" in used:
            total = total + self.one(indices).square().sum()
        if "b" in used:
            total = total + self.two(indices.flip(0)).sin().sum()
        if "c" in used:
            total = total + self.other(indices).cos().sum()
        return total


def sparse_as_dense(scheme: str) -> list[list[bytes]]:
    exchanged = []
    model, dense = Embeddings(), Embeddings(sparse=False)
    compressor = make_qoda(model, exchange=scheme)
    optimizer = make_optimizer(model, compressor, sparse_as_dense=True)
    for step in range(3):
        used = {0: "abc", 1: "ab", 2: "bc"}[(step + hvd.rank()) % 3] if step else "abc"
        optimizer.zero_grad()
        dense.zero_grad()
        dense.load_state_dict(model.state_dict())
        dense.loss(step, used).backward()
        model.loss(step, used).backward()
        optimizer.synchronize()
        assert_gradients(model, compressor, gradients(dense))
        exchanged.append(bits_of(gradients(model).values()))
        with optimizer.skip_synchronize():
            optimizer.step()
        # Where one rank's gradient is sparse and another's missing, torch rounds their equal updates differently.
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    return exchanged


@pytest.mark.parametrize("scheme", SCHEMES)
def test_horovod_sparse_as_dense_is_identified_among_pending_sparse_gradients(two_ranks: RankPool, scheme: str) -> None:
    results = two_ranks.run(sparse_as_dense, scheme)
    assert results[0] == results[1]


def sparse_left_to_horovod(bits: int) -> list[bytes]:
    # Only what is sparse has its usual codes: the dense layers are to equal Horovod's own bit for bit.
    results = []
    for compress in (True, False):
        model = Embeddings()
        rules = [{"name": "*", "bits": 32}, {"type": "embedding", "bits": bits, "min_numel": 1}]
        compression = make_qoda(model, layers=rules) if compress else hvd.Compression.none
        optimizer = make_optimizer(model, compression)
        for step in range(3):
            optimizer.zero_grad()
            model.loss(step).backward()
            optimizer.step()
        results.append(bits_of(model.parameters()))
    assert results[0] == results[1]
    return results[0]


@pytest.mark.parametrize("bits", [5, 32])
def test_horovod_sparse_gradients_without_sparse_as_dense_come_back_as_they_are(two_ranks: RankPool, bits: int) -> None:
    results = two_ranks.run(sparse_left_to_horovod, bits)
    assert results[0] == results[1]


def sparse_with_groups() -> str:
    model = Embeddings()
    optimizer = make_optimizer(model, make_qoda(model), groups=2)
    optimizer.zero_grad()
    with pytest.raises(UnsupportedError, match=r"sparse gradient reached the compressor.*groups"):
        model.loss(0).backward()
    return "refused"


def test_horovod_sparse_with_groups_is_refused(two_ranks: RankPool) -> None:
    assert two_ranks.run(sparse_with_groups) == ["refused"] * 2


# -- the index by itself ---------------------------------------------------------------------------------------------


def index_of(**parameters: torch.Tensor) -> GradientIndex:
    return GradientIndex({name: nn.Parameter(tensor) for name, tensor in parameters.items()})


def parameters_with_gradients(count: int) -> dict[str, torch.Tensor]:
    parameters = {f"p{i}": nn.Parameter(torch.zeros(2, 3)) for i in range(count)}
    for parameter in parameters.values():
        parameter.grad = torch.zeros(2, 3)
    return parameters


def test_gradients_are_found_by_identity_in_any_order() -> None:
    parameters = parameters_with_gradients(20)
    index = GradientIndex(parameters)
    for order in (list(parameters), list(reversed(parameters)), list(parameters)[::2]):
        assert [index.name_of(parameters[name].grad) for name in order] == order
    for parameter in parameters.values():
        parameter.grad = torch.zeros(2, 3)  # zero_grad(set_to_none=True), then backward
    assert [index.name_of(parameters[name].grad) for name in parameters] == list(parameters)


def test_finding_a_gradient_takes_constant_time_once_the_order_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = parameters_with_gradients(300)
    index = GradientIndex(parameters)
    asked = 0

    class Counting(dict[tuple[int, ...], list[str]]):
        def get(self, key: Any, default: Any = None) -> Any:
            nonlocal asked
            asked += 1
            return super().get(key, default)

    for parameter in parameters.values():
        index.name_of(parameter.grad)
    monkeypatch.setattr(index, "_names_by_shape", Counting(index._names_by_shape))
    for _ in range(3):
        for parameter in parameters.values():
            parameter.grad = torch.zeros(2, 3)
        for parameter in parameters.values():
            index.name_of(parameter.grad)
    assert asked <= 3  # at most where a step begins
    assert len(index._by_gradient) <= 5 * len(parameters)


def test_unknown_tensor_is_refused_with_advice() -> None:
    index = index_of(weight=torch.zeros(2, 3))
    with pytest.raises(UnsupportedError, match=r"float32 tensor of shape \(4,\).*no parameter.*same parameters"):
        index.name_of(torch.zeros(4))
    with pytest.raises(UnsupportedError, match="no parameter"):
        index.name_of(torch.zeros(2, 3))


def test_parameter_itself_is_refused_as_adasum() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3))
    parameter.grad = torch.zeros(2, 3)
    with pytest.raises(UnsupportedError, match=r"'weight'.*Adasum"):
        GradientIndex({"weight": parameter}).name_of(parameter)


def sparse(values: list[float]) -> torch.Tensor:
    return torch.sparse_coo_tensor([[0, 1]], [[v, v] for v in values], (3, 2))


def test_dense_forms_of_equal_sparse_gradients_are_refused() -> None:
    parameters = {name: nn.Parameter(torch.zeros(3, 2)) for name in ("one", "two", "three")}
    index = GradientIndex(parameters)
    parameters["one"].grad = sparse([1.0, float("nan")])
    parameters["two"].grad = sparse([1.0, 3.0])
    assert index.name_of(parameters["one"].grad.to_dense()) == "one"
    assert index.name_of(parameters["two"].grad.to_dense()) == "two"
    parameters["three"].grad = sparse([1.0, 3.0])
    with pytest.raises(UnsupportedError, match=r"several parameters: two, three"):
        index.name_of(parameters["two"].grad.to_dense())
    assert index.name_of(parameters["two"].grad.to_dense(), taken=["three"]) == "two"
