"""Puts the plug-in into every process that DeepSpeed's own tests start; used by `run_deepspeed_tests.py`.

DeepSpeed's tests run in processes that they spawn, which import nothing of ours. Python imports this module when it
starts, from a folder that only those tests have on their path. Every configuration without a "qoda" block gets one,
unless the number of bits is "none": so the tests without the plug-in are otherwise run in the same way. At the end a
process writes how many steps went through the plug-in, so that a test cannot pass by not using it.
"""

import importlib.abc
import importlib.machinery
import json
import multiprocessing.util
import os
import sys
from pathlib import Path
from typing import Any

BITS_VARIABLE, COUNT_VARIABLE = "HVD_QODA_UPSTREAM_BITS", "HVD_QODA_UPSTREAM_COUNTS"


def _substitute(deepspeed: Any) -> None:
    # Else every process compiles it; the CPU's collectives work without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if os.environ[BITS_VARIABLE] == "none":
        return
    import ds_plugin

    bits = int(os.environ[BITS_VARIABLE])
    original = deepspeed.initialize
    states: list[Any] = []

    def initialize(*arguments: Any, config: Any = None, config_params: Any = None, **more: Any) -> Any:
        config = config_params if config is None else config
        if isinstance(config, (str, os.PathLike)):
            config = json.loads(Path(config).read_text())
        if isinstance(config, dict):
            config.setdefault("qoda", {"bits": bits, "levels": "uniform"})
        result = original(*arguments, config=config, **more)
        states.append(vars(result[0]).get("qoda_state"))  # which a destroyed engine forgets
        return result

    def tell() -> None:
        steps = sum(state.reducer.step for state in states if state is not None)
        with Path(os.environ[COUNT_VARIABLE]).open("a") as file:
            file.write(f"{len(states)} {steps}\n")

    deepspeed.initialize = initialize
    # Processes of multiprocessing end without what atexit has registered.
    multiprocessing.util.Finalize(None, tell, exitpriority=1)
    assert ds_plugin.require is not None


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets DeepSpeed be imported as ever, and then substitutes."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "deepspeed":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _substitute(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one loader
        return spec


if os.environ.get(BITS_VARIABLE):
    sys.meta_path.insert(0, _AfterImport())
