"""The plug-in's state in DeepSpeed's checkpoints.

What all ranks have in common (levels, statistics, numbers of steps and exchanges) is saved in the client state under
"qoda", by DeepSpeed itself. What only one rank has (its last messages with worker_norms, its residuals with
error_feedback) is saved beside it, by every rank, in qoda_rank_<rank>.pt.

A checkpoint may be made at any time: between the micro-batches of a step, or after a batch that is thrown away. As
DeepSpeed saves no accumulated gradients, the plug-in saves its state before the step under way, and both take that
step anew.

DeepSpeed alone reads such a checkpoint as any other: the model goes on with uncompressed gradients, and "qoda" is one
more key of the client state. So that this does not happen unnoticed there is a note beside the state, qoda.json, for
people and for `python -m ds_plugin check CHECKPOINT` (`ds_plugin.note`).
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch

from ds_plugin import note
from ds_plugin.engine import EngineState, state_of
from hvd_qoda.errors import ConfigError

__all__ = ["KEY", "load", "save"]

KEY = "qoda"
_logger = logging.getLogger(__name__)

Method = Callable[..., Any]


def save(
    original: Method,
    engine: Any,
    save_dir: str | os.PathLike[str],
    tag: Any = None,
    client_state: dict[str, Any] | None = None,
    save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
) -> Any:
    """`engine.save_checkpoint`, with the plug-in's state; the latest checkpoint is always a complete one.

    Raises:
        ConfigError: if the caller's client state has a key "qoda".
    """
    client_state = dict(client_state or {})
    state = state_of(engine)
    options = {"save_latest": save_latest, "exclude_frozen_parameters": exclude_frozen_parameters}
    if state is None:
        return original(engine, save_dir, tag=tag, client_state=client_state, **options)
    if KEY in client_state:
        raise ConfigError(f"client_state has a key {KEY!r}, which is the plug-in's: call it something else")
    tag = str(f"global_step{engine.global_steps}" if tag is None else tag)
    client_state[KEY] = state.reducer.state_dict()
    private = state.reducer.private_state()
    Path(save_dir, tag).mkdir(parents=True, exist_ok=True)
    if private is not None:
        torch.save(private, _private_file(save_dir, tag, engine))
    if engine.global_rank == 0:
        names = [_private_file(save_dir, tag, engine, rank).name for rank in range(state.reducer.transport.size)]
        optimizer = type(engine.basic_optimizer).__name__
        note.write(Path(save_dir, tag), state.reducer.config, optimizer, names if private is not None else [])
    # DeepSpeed's rank 0 names a checkpoint as the latest when its own files are written, not everybody's.
    names_latest = save_latest and not engine.checkpoint_engine.is_decoupled()
    options["save_latest"] = save_latest and not names_latest
    result = original(engine, save_dir, tag=tag, client_state=client_state, **options)  # ends with a barrier
    if names_latest and engine.global_rank == 0:
        _replace(Path(save_dir, "latest"), tag)
    deepspeed.comm.barrier()
    return result


def load(
    original: Method,
    engine: Any,
    load_dir: str | os.PathLike[str],
    tag: Any = None,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    custom_load_fn: Any = None,
) -> Any:
    """`engine.load_checkpoint`, with the plug-in's state, which goes on where it was saved.

    It starts anew, with a warning, where the checkpoint has no such state; and silently, like the optimizer, where only
    the model or no optimizer state is loaded. An engine without a "qoda" block leaves the state in the client state,
    with a warning.

    Raises:
        RegistryError: on every rank, for the state of another model or configuration.
        RankMismatchError: on every rank, if ranks have loaded different states.
    """
    path, client_state = original(
        engine,
        load_dir,
        tag=tag,
        load_module_strict=load_module_strict,
        load_optimizer_states=load_optimizer_states,
        load_lr_scheduler_states=load_lr_scheduler_states,
        load_module_only=load_module_only,
        custom_load_fn=custom_load_fn,
    )
    state = state_of(engine)
    if state is None and path is not None and KEY in client_state:
        _logger.warning(
            'the checkpoint %s comes from a training with compressed gradients, and this engine has no "qoda" block: '
            "it goes on from the same weights with DeepSpeed's own gradients",
            path,
        )
    if state is None or path is None:
        return path, client_state
    saved = client_state.pop(KEY, None)
    if load_optimizer_states and not load_module_only:
        if saved is None:
            _logger.warning(
                'the checkpoint %s was saved without the "qoda" block: its training goes on with levels as at a '
                "beginning, and compression counts its steps from 1",
                path,
            )
        else:
            _restore(engine, state, saved, Path(str(path)).parent)
    return path, client_state


def _replace(path: Path, text: str) -> None:
    """Write a file that is the old or the new one, whatever happens meanwhile."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def _restore(engine: Any, state: EngineState, saved: dict[str, Any], folder: Path) -> None:
    private = None
    if state.reducer.has_private_state:
        file = _private_file(folder.parent, folder.name, engine)
        if saved["ranks"] != state.reducer.transport.size:
            _logger.warning(
                "the checkpoint was saved by %s ranks, and now there are %s: what only single ranks know (their last "
                "gradients or residuals) is taken for zero",
                saved["ranks"],
                state.reducer.transport.size,
            )
        elif file.is_file():
            private = torch.load(file, map_location="cpu", weights_only=True)
        else:
            _logger.warning("there is no file %s: this rank's last gradients or residuals are taken for zero", file)
    state.reducer.load_state_dict(saved, private)


def _private_file(folder: str | os.PathLike[str], tag: str, engine: Any, rank: int | None = None) -> Path:
    return Path(folder) / tag / f"{KEY}_rank_{engine.global_rank if rank is None else rank:05d}.pt"
