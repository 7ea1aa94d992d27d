"""What `import ds_plugin` does, and what users call."""

from typing import Any

import deepspeed

from ds_plugin import hooks
from ds_plugin.config import BLOCK
from ds_plugin.engine import state_of
from ds_plugin.optimizers import register_names
from ds_plugin.reducer import GradientReducer
from ds_plugin.versions import check_version
from hvd_qoda.errors import ConfigError
from hvd_qoda.telemetry import Telemetry

__all__ = ["add_telemetry", "reducer_of", "require"]


def require(engine: Any) -> None:
    """Make sure that an engine compresses its gradients: one line after `deepspeed.initialize`.

    Raises:
        ConfigError: if it does not, saying why.
    """
    if state_of(engine) is not None:
        return
    if not isinstance(engine, deepspeed.DeepSpeedEngine):
        raise ConfigError(
            f"a {type(engine).__name__} is no engine: give what deepspeed.initialize() returns first; under Hugging "
            "Face that is trainer.model_wrapped, or the model that accelerator.prepare() returns"
        )
    if BLOCK not in engine._config._param_dict:
        reason = "there is none in its configuration"
    elif engine.optimizer is None or isinstance(engine.optimizer, deepspeed.runtime.utils.DummyOptim):
        reason = "nobody has read it: the engine has no optimizer, so it reduces no gradients"
    else:
        reason = "nobody has read it: import ds_plugin before deepspeed.initialize()"
    raise ConfigError(f'this engine sends its gradients uncompressed; of a "{BLOCK}" block, {reason}')


def reducer_of(engine: Any) -> GradientReducer:
    """What reduces an engine's gradients: its step, traffic, registry and worker norms.

    Raises:
        ConfigError: if the engine does not compress its gradients.
    """
    require(engine)
    state = state_of(engine)
    assert state is not None  # as `require` has found
    return state.reducer


def add_telemetry(engine: Any, telemetry: Telemetry) -> None:
    """Send one record per step to a telemetry, besides `engine.monitor`.

    Args:
        engine: an engine with a "qoda" block.
        telemetry: made with `rank=engine.global_rank`; closing it is left to the caller.
    """
    reducer_of(engine).reports.add(telemetry)


check_version(deepspeed.__version__)
hooks.install()
register_names()
