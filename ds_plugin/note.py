"""The note in a checkpoint's folder that says what its training used, and what goes on without it.

DeepSpeed alone cannot say that a checkpoint comes from a training with the plug-in: the note can, to whoever looks into
the folder and to `python -m ds_plugin check CHECKPOINT`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from ds_plugin.config import BLOCK
from hvd_qoda.config import QodaConfig
from hvd_qoda.errors import ConfigError
from hvd_qoda.optim import QODA, QODAdam
from qoda_kernels import __version__

__all__ = ["FILE", "describe", "write"]

FILE = "qoda.json"
_ABOUT = (
    "This checkpoint comes from a training with gradients compressed by hvd-qoda's plug-in for DeepSpeed. To go on "
    'exactly: import ds_plugin before deepspeed.initialize(), the same "qoda" block, the same number of ranks, and all '
    "files named here. Without the plug-in DeepSpeed loads it as any other and goes on from the same weights and "
    'optimizer state with uncompressed gradients; the client state then has a key "qoda", which can be ignored.'
)


def write(folder: Path, config: QodaConfig, optimizer: str | None, rank_files: Sequence[str]) -> None:
    """Write the note.

    Args:
        folder: of the checkpoint, with its tag.
        config: of the "qoda" block.
        optimizer: name of the class.
        rank_files: names of the ranks' own files; empty if there are none.
    """
    values = {
        "about": _ABOUT,
        "hvd_qoda": __version__,
        "optimizer": optimizer if optimizer in (QODA.__name__, QODAdam.__name__) else None,
        "rank_files": list(rank_files),
        BLOCK: config.to_dict(),
    }
    (folder / FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def describe(checkpoint: Path) -> str:
    """What it takes to go on from a checkpoint, some lines of text.

    Args:
        checkpoint: a folder given to `save_checkpoint`, of which the latest tag is looked at, or that of one tag.

    Raises:
        ConfigError: if there is no note, or something that belongs to the checkpoint is missing.
    """
    folder = _folder_of_tag(checkpoint)
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        block, files, optimizer = values[BLOCK], list(values["rank_files"]), values["optimizer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} has no readable {FILE} ({error}): it comes from a training without a {BLOCK!r} block, or not "
            "all of it was copied"
        ) from None
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{folder} lacks {', '.join(missing)}: these ranks' last gradients or residuals would be taken for zero"
        )
    lines = [f"{folder}: {values['about']}", f'block "{BLOCK}": {json.dumps(block)}']
    if files:
        lines.append(f"files of single ranks: {len(files)}, all there")
    if optimizer is not None:
        lines.append(f'"optimizer": {{"type": "{optimizer}"}} is known to DeepSpeed only after import ds_plugin')
    return "\n".join(lines)


def _folder_of_tag(checkpoint: Path) -> Path:
    latest = checkpoint / "latest"
    if (checkpoint / FILE).is_file() or not latest.is_file():
        return checkpoint
    return checkpoint / latest.read_text(encoding="utf-8").strip()
