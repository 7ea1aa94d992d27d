"""What a training run is told on its command line: every option, its default and its checks."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.train.data import DIGITS
from launch.train.models import SIZES, width_of
from qoda_kernels.codebook import EXACT_BITS, MAX_BITS, MIN_BITS, ROTATIONS, ROUNDINGS
from qoda_kernels.registry import LEVEL_SCHEMES

OPTIMIZERS = ("qoda", "qodadam", "sgd", "adam")
LEARNING_RATES = {"qoda": 3.0, "qodadam": 1e-3, "sgd": 5e-2, "adam": 1e-3}
COMPRESSIONS = ("none", "fp16", "qoda")
ROUTES = ("stock", "overlap")
EXCHANGES = ("auto", "allgather", "reduce_scatter", "hierarchical", "by_bytes", "off")
DITHERS = ("independent", "stratified")
CODEBOOK_OPTIONS = (
    "bits",
    "reference_bits",
    "bits_budget",
    "codebooks",
    "levels",
    "dither",
    "rotation",
    "rounding",
    "error_feedback",
)
WANDB_MODES = ("online", "offline", "disabled")


@dataclass(frozen=True)
class Options:
    """One training run; the fields are the command line's options."""

    data: str
    model_size: str
    epochs: float | None
    steps: int | None
    batch_size: int
    optimizer: str
    learning_rate: float
    compression: str
    route: str
    fusion_buffer_mb: float
    bits: int | str
    reference_bits: int
    bits_budget: str
    codebooks: str
    bucket_size: int
    levels: str
    dither: str
    rotation: str
    rounding: str
    error_feedback: bool
    exchange: str
    min_numel: int
    update_levels_at: tuple[int, ...]
    update_levels_every: int
    measure_error_every: int
    wandb: str
    wandb_project: str
    run_dir: Path
    resume: Path | None
    checkpoint_every: int
    threads: int
    json: Path | None
    seed: int

    def decides_result(self) -> dict[str, Any]:
        """The options on which the trained bits depend: what a checkpoint and the run resuming it must share."""
        free = {"epochs", "steps", "wandb", "wandb_project", "run_dir", "resume", "checkpoint_every", "json"}
        free |= {"measure_error_every"}
        if self.compression != "qoda":
            free |= {"bucket_size", "exchange", "min_numel", "fusion_buffer_mb"}
            free |= {"update_levels_at", "update_levels_every", *CODEBOOK_OPTIONS}
        elif self.levels in ("uniform", "exponential") and self.bits != "auto":
            free |= {"update_levels_at", "update_levels_every"}
        if self.bits != "auto":
            free |= {"reference_bits", "bits_budget"}
        return {key: value for key, value in asdict(self).items() if key not in free}

    def as_json(self) -> dict[str, Any]:
        """All options as values that JSON can hold."""
        values = asdict(self)
        return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each option's default, and a description with the line breaks it was written with."""


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def not_negative(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def steps_list(text: str) -> tuple[int, ...]:
    """Step numbers separated by commas, for argparse; an empty text is an empty list."""
    steps = tuple(int(part) for part in text.split(",") if part.strip())
    if any(step < 1 for step in steps) or list(steps) != sorted(set(steps)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a rising list of step numbers from 1 on")
    return steps


def bits_or_auto(text: str) -> int | str:
    """A code width from 2 to 8, 32 for no compression, or "auto", for argparse."""
    if text == "auto":
        return text
    bits = int(text)
    if bits != EXACT_BITS and not MIN_BITS <= bits <= MAX_BITS:
        raise argparse.ArgumentTypeError(f"{text} is not {MIN_BITS} to {MAX_BITS}, {EXACT_BITS} or auto")
    return bits


def add_codebook_options(parser: argparse._ArgumentGroup) -> None:
    """How gradients are quantized: CODEBOOK_OPTIONS."""
    widths = range(MIN_BITS, MAX_BITS + 1)
    parser.add_argument(
        "--bits", type=bits_or_auto, default=5, help="bits per coordinate; 32: not compressed; auto: planned by layer"
    )
    parser.add_argument(
        "--reference-bits", type=int, choices=widths, default=5, help="width that --bits auto is measured by"
    )
    parser.add_argument(
        "--bits-budget",
        choices=("variance", "bytes"),
        default="variance",
        help="--bits auto: no more squared error than the reference's, or no more bytes",
    )
    parser.add_argument(
        "--codebooks", choices=("per_type", "per_layer"), default="per_type", help="levels (and bits) of their own"
    )
    parser.add_argument("--levels", choices=LEVEL_SCHEMES, default="adaptive", help="quantization levels")
    parser.add_argument(
        "--dither", choices=DITHERS, default="independent", help="random rounding of the ranks' gradients"
    )
    parser.add_argument("--rotation", choices=ROTATIONS, default="none", help="of buckets, at random")
    parser.add_argument("--rounding", choices=ROUNDINGS, default="stochastic", help="nearest: rotated buckets only")
    parser.add_argument(
        "--error-feedback", action="store_true", help="add what a message leaves out to the next gradient"
    )


def codebook_settings(options: Any) -> dict[str, Any]:
    """What `add_codebook_options` has read, as keys of the library's configuration."""
    settings: dict[str, Any] = {
        "bits": options.bits,
        "codebooks": options.codebooks,
        "levels": options.levels,
        "dither": options.dither,
        "rotation": options.rotation,
        "rounding": options.rounding,
        "error_feedback": options.error_feedback,
    }
    if options.bits == "auto":
        settings["auto_bits"] = {"budget": options.bits_budget, "reference": options.reference_bits}
    return settings


def _model_size(text: str) -> str:
    try:
        width_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _positive_float(text: str) -> float:
    number = float(text)
    if not number > 0.0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def build_parser(description: str) -> argparse.ArgumentParser:
    """The command line of one training run."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    task = parser.add_argument_group("task")
    task.add_argument("--data", default=DIGITS, metavar="DIR", help="directory with the MNIST files, or 'digits'")
    task.add_argument(
        "--model-size", type=_model_size, default="medium", help=f"{', '.join(SIZES)}, or a width factor such as 4"
    )
    length = task.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=_positive_float, help="passes over the training data (1 if no --steps)")
    length.add_argument("--steps", type=positive, help="optimizer steps, instead of --epochs")
    task.add_argument("--batch-size", type=positive, default=64, help="examples per rank and step")
    task.add_argument("--seed", type=not_negative, default=0, help="of weights, order of data and random rounding")

    optimizer = parser.add_argument_group("optimizer")
    optimizer.add_argument("--optimizer", choices=OPTIMIZERS, default="qodadam", help="what steps the model")
    optimizer.add_argument(
        "--learning-rate",
        type=_positive_float,
        help="base learning rate; None: " + ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items()),
    )

    compression = parser.add_argument_group("compression of gradients")
    compression.add_argument(
        "--compression", choices=COMPRESSIONS, default="qoda", help="how gradients travel; none is plain Horovod fp32"
    )
    compression.add_argument(
        "--route",
        choices=ROUTES,
        default="stock",
        help="stock: hvd.DistributedOptimizer, a message for each parameter; overlap: hvd_qoda.DistributedOptimizer, "
        "fusion buffers sent while backward goes on (qoda)",
    )
    compression.add_argument(
        "--fusion-buffer-mb",
        type=_positive_float,
        default=16.0,
        metavar="MB",
        help="megabytes (2^20 bytes) of gradients in one message (--route overlap)",
    )
    add_codebook_options(compression)
    compression.add_argument(
        "--bucket-size", type=positive, default=512, help="coordinates that share one norm, a multiple of 128 (qoda)"
    )
    compression.add_argument(
        "--exchange", choices=EXCHANGES, default="auto", help="which collectives carry the messages (qoda)"
    )
    compression.add_argument(
        "--min-numel",
        type=not_negative,
        default=1024,
        metavar="N",
        help="tensors of fewer values travel as they are, like biases and norm weights (qoda)",
    )
    compression.add_argument(
        "--update-levels-at",
        type=steps_list,
        default=(100, 2000),
        metavar="STEPS",
        help="steps, separated by commas, at which adaptive levels are fitted to the gradients",
    )
    compression.add_argument(
        "--update-levels-every",
        type=not_negative,
        default=10000,
        metavar="N",
        help="fit adaptive levels every N steps too; 0: only at the steps listed",
    )
    compression.add_argument(
        "--measure-error-every",
        type=not_negative,
        default=100,
        metavar="N",
        help="steps between measurements of the quantization error, which cost a decoding each; 0: never",
    )

    records = parser.add_argument_group("records")
    records.add_argument("--run-dir", type=Path, default=Path("runs/mnist"), help="where records and checkpoints go")
    records.add_argument("--json", type=Path, metavar="PATH", help="write the summary there as well")
    records.add_argument("--wandb", choices=WANDB_MODES, default="disabled", help="Weights & Biases mode (rank 0 only)")
    records.add_argument("--wandb-project", default="hvd-qoda", help="Weights & Biases project")
    records.add_argument(
        "--checkpoint-every", type=not_negative, default=0, metavar="N", help="steps between checkpoints; 0: none"
    )
    records.add_argument(
        "--resume", type=Path, metavar="PATH", help="go on from this checkpoint, or from a run directory's latest one"
    )
    parser.add_argument(
        "--threads",
        type=not_negative,
        default=0,
        help="torch threads per rank; 0: the host's cores divided by its ranks",
    )
    return parser


def parse_options(description: str, arguments: Sequence[str] | None = None) -> Options:
    """Read a training run's options from `arguments` (the process's own if None); leaves with a message if wrong."""
    parser = build_parser(description)
    values = vars(parser.parse_args(arguments))
    if values["route"] == "overlap" and values["compression"] != "qoda":
        parser.error("--route overlap is for --compression qoda")
    if values["learning_rate"] is None:
        values["learning_rate"] = LEARNING_RATES[values["optimizer"]]
    if values["epochs"] is None and values["steps"] is None:
        values["epochs"] = 1.0
    return Options(**values)
