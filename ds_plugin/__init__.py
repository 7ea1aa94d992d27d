"""Layer-wise quantized gradients and the QODA optimizers for DeepSpeed.

    import deepspeed, ds_plugin                              # the import is all
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config="ds_config.json")

with a block "qoda" in ds_config.json, whose keys are those of `hvd_qoda.QodaConfig`; {} for the defaults. Without the
import DeepSpeed ignores the block: `ds_plugin.require(engine)` makes sure that it was read, and
`python -m ds_plugin check ds_config.json` looks at a configuration before a run.
"""

import importlib.util

from qoda_kernels import __version__

__all__ = ["__version__"]

if importlib.util.find_spec("deepspeed") is not None:
    from ds_plugin.plugin import add_telemetry, reducer_of, require

    __all__ += ["add_telemetry", "reducer_of", "require"]
