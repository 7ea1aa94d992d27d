"""Images, labels, and which of them each rank sees."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.train.data import BatchSchedule, DataError, digits, load_dataset, read_idx


def idx(values: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.astype(np.uint8).tobytes()


def write_mnist(folder: Path, packed: bool, train: int = 20, test: int = 10) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    written = {}
    folder.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        for kind, shape, top in (("images-idx3", (count, 28, 28), 256), ("labels-idx1", (count,), 10)):
            values = random.integers(0, top, shape)
            name = f"{part}-{kind}-ubyte"
            written[name] = values
            path = folder / (name + (".gz" if packed else ""))
            path.write_bytes(gzip.compress(idx(values)) if packed else idx(values))
    return written


def test_digits_have_a_fixed_split_without_overlap() -> None:
    first, again = digits(), digits()
    assert first.train.images.shape == (1437, 1, 16, 16)
    assert first.test.images.shape == (360, 1, 16, 16)
    assert first.train.images.dtype == torch.float32
    assert first.train.labels.dtype == torch.int64
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.test.labels, again.test.labels)
    assert set(first.test.labels.tolist()) == set(range(10))
    everything = torch.cat([first.train.images, first.test.images])
    assert abs(float(everything.mean())) < 1e-4
    seen = {image.numpy().tobytes() for image in first.train.images}
    overlap = sum(image.numpy().tobytes() in seen for image in first.test.images)
    assert overlap == 0


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("below", ["", "raw", "MNIST", "MNIST/raw"])
def test_mnist_is_found_packed_or_not_in_the_usual_folders(tmp_path: Path, packed: bool, below: str) -> None:
    written = write_mnist(tmp_path / "data" / below, packed)
    dataset = load_dataset(str(tmp_path / "data"))
    assert dataset.name == "mnist"
    assert dataset.train.images.shape == (20, 1, 28, 28)
    assert dataset.test.labels.tolist() == written["t10k-labels-idx1-ubyte"].tolist()
    pixel = written["train-images-idx3-ubyte"][3, 5, 7]
    assert float(dataset.train.images[3, 0, 5, 7]) == pytest.approx((pixel / 255 - 0.1307) / 0.3081, rel=1e-5, abs=1e-6)


def test_missing_mnist_says_which_file_and_where(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte .*MNIST/raw"):
        load_dataset(str(tmp_path))


def test_images_without_as_many_labels_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path / "data", packed=False)
    (tmp_path / "data" / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(19)))
    with pytest.raises(DataError, match="do not fit labels"):
        load_dataset(str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00", "not an IDX file"),
        (bytes([0, 0, 8, 3, 0, 0]), "within its header"),
        (idx(np.zeros(5))[:-1], "holds 4 values"),
        (idx(np.zeros(5)) + b"\x00", "holds 6 values"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(path)


def test_a_packed_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(idx(np.zeros(50)))[:-6])
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(path)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_see_disjoint_examples_and_do_as_many_steps(ranks: int) -> None:
    schedules = [BatchSchedule(100, 7, rank, ranks, seed=3) for rank in range(ranks)]
    assert {schedule.steps_per_epoch for schedule in schedules} == {100 // (7 * ranks)}
    for epoch in range(2):
        steps = range(epoch * schedules[0].steps_per_epoch, (epoch + 1) * schedules[0].steps_per_epoch)
        seen = [index for schedule in schedules for step in steps for index in schedule.indices(step).tolist()]
        assert len(seen) == len(set(seen)) == schedules[0].steps_per_epoch * 7 * ranks


def test_batches_depend_on_seed_and_epoch_and_on_nothing_else() -> None:
    schedule = BatchSchedule(100, 7, 0, 2, seed=3)
    assert schedule.indices(4).tolist() == BatchSchedule(100, 7, 0, 2, seed=3).indices(4).tolist()
    assert schedule.indices(0).tolist() != schedule.indices(schedule.steps_per_epoch).tolist()
    assert schedule.indices(0).tolist() != BatchSchedule(100, 7, 0, 2, seed=4).indices(0).tolist()


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(DataError, match="smaller --batch-size"):
        BatchSchedule(100, 51, 0, 2, seed=0)
