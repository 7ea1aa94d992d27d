"""Records in Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvd_qoda.telemetry import StartRecord, StepRecord, TelemetryError, flat_metrics

__all__ = ["WandbSink"]

_MODES = ("online", "offline", "disabled")
_STEP = "qoda_step"


class WandbSink:
    """Logs the names of `flat_metrics` per step, configuration and code tables once, and levels when they change.

    mode: "online", "offline" or "disabled"; None: what the environment variable WANDB_MODE says, else online.
        "disabled" neither imports wandb nor writes.
    project, directory: W&B's project, and the folder in which it makes its own folder `wandb` (the current one by
        default).
    run: an existing run to log into; it is not finished at close. Its own step counter is left to its owner: steps are
        logged as the metric `qoda_step`, which the metrics `qoda/*` and `step_size/*` use as their axis. Otherwise a
        run is made, whose steps are ours.
    init: further arguments of `wandb.init` (name, group, tags, id, settings ...).

    Configuration goes to the run's config under its own names, codebooks to the key `codebooks`. Levels that changed
    appear exactly in the table `qoda/levels` and as histograms `qoda/<layer type>/levels`.

    The run's id is this sink's state: a resumed run continues it. Online, W&B keeps the first values of steps that are
    done again.

    Raises TelemetryError for another mode, and at start if wandb is not installed, or if a run is active that was not
    given.
    """

    def __init__(
        self,
        mode: str | None = None,
        project: str = "hvd-qoda",
        directory: str | os.PathLike[str] | None = None,
        run: Any = None,
        **init: Any,
    ) -> None:
        if mode is not None and mode not in _MODES:
            raise TelemetryError(f"W&B mode is {mode!r}, expected one of {', '.join(_MODES)}")
        # Read here, since wandb reads its environment once per process.
        self._mode = mode or os.environ.get("WANDB_MODE")
        self._directory = directory
        self._borrowed = run is not None
        self._init = {"project": project, **init}
        self._run = run
        self._run_id: str | None = init.get("id")
        self._resuming = False
        self._started = False

    @property
    def every_rank(self) -> bool:
        """False: rank 0 logs."""
        return False

    def start(self, start: StartRecord) -> None:
        """Make the run, if none was given; log configuration and codebooks."""
        if self._mode == "disabled":
            return
        if self._run is None:
            self._run = self._make_run()
        if self._borrowed and not self._started:
            self._run.define_metric(_STEP)
            for pattern in ("qoda/*", "step_size/*"):
                self._run.define_metric(pattern, step_metric=_STEP)
        self._started = True
        self._run_id = self._run.id
        codebooks = {"codebooks": start.codebooks} if start.codebooks else {}
        self._run.config.update({**start.config, **codebooks}, allow_val_change=True)

    def write(self, record: StepRecord) -> None:
        """Log one step, as one row of W&B's history."""
        if self._mode == "disabled":
            return
        if self._run is None:
            raise TelemetryError("WandbSink: start() comes before write()")
        row = {**flat_metrics(record), **_levels(record)}
        if self._borrowed:
            self._run.log({_STEP: record.step, **row})
        else:
            self._run.log(row, step=record.step)

    def close(self, failed: bool = False) -> None:
        """Finish the run if it was made here; a failed training marks it as failed."""
        if self._run is not None and not self._borrowed:
            self._run.finish(exit_code=1 if failed else 0)
            self._run = None

    def state_dict(self) -> dict[str, Any]:
        """The run's id; None where no run was started."""
        return {"run_id": self._run_id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the run of that id; an `id` given by the caller, or a run, wins."""
        if state["run_id"] is not None and self._run_id is None and not self._borrowed:
            self._run_id = state["run_id"]
            self._resuming = True

    def _make_run(self) -> Any:
        arguments = dict(self._init)
        if self._mode is not None:
            arguments["mode"] = self._mode
        if self._directory is not None:
            # W&B would log elsewhere, with no more than a warning, if the folder were missing.
            Path(self._directory).mkdir(parents=True, exist_ok=True)
            arguments["dir"] = os.fspath(self._directory)
        if self._resuming:
            arguments["id"] = self._run_id
            if self._mode != "offline":  # offline runs with one id are joined when they are synchronised
                arguments.setdefault("resume", "allow")
        wandb = _wandb()
        if wandb.run is not None and "reinit" not in arguments:
            # wandb.init would hand out that run, and we would finish it.
            raise TelemetryError("a W&B run is active in this process: WandbSink(run=wandb.run) logs into it")
        return wandb.init(**arguments)


def _levels(record: StepRecord) -> dict[str, Any]:
    """Table and histograms of the levels that changed in this step; nothing in most steps."""
    changed = [entry for entry in record.layer_types if entry.levels]
    if not changed:
        return {}
    wandb = _wandb()
    rows = [
        [entry.layer_type, entry.bits, record.registry_version, index, level]
        for entry in changed
        for index, level in enumerate(entry.levels or ())
    ]
    table = wandb.Table(columns=["layer_type", "bits", "registry_version", "index", "level"], data=rows)
    histograms = {f"qoda/{entry.layer_type}/levels": wandb.Histogram(list(entry.levels or ())) for entry in changed}
    return {"qoda/levels": table, **histograms}


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise TelemetryError("WandbSink needs the package wandb: pip install 'hvd-qoda[wandb]'") from error
    return wandb
