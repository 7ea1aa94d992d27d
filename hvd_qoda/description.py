"""What ranks must agree on before they exchange gradients, described for `hvd_qoda.agreement`."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from hvd_qoda.config import QodaConfig
from hvd_qoda.level_updates import LevelUpdates
from qoda_kernels import __version__
from qoda_kernels.registry import CodebookRegistry
from qoda_kernels.wire import WIRE_VERSION

__all__ = ["training_description"]


def training_description(
    name: str, config: QodaConfig, registry: CodebookRegistry, step: int, levels: LevelUpdates
) -> dict[str, Any]:
    """Everything that ranks must agree on, whatever the host, as JSON-able values.

    Args:
        name: that the user has given.
        config: the configuration.
        registry: the model's layer types and codebooks.
        step: number of the last step.
        levels: the statistics gathered so far.
    """
    described = registry.describe()
    # Each rank codes where it can: the bits are the same.
    configuration = {key: value for key, value in config.to_dict().items() if key != "codec_device"}
    return {
        "version of hvd_qoda": __version__,
        "wire version": WIRE_VERSION,
        "name": name,
        "configuration": configuration,
        "parameter": {
            entry["name"]: f"{entry['dtype']} {entry['shape']}, type {entry['layer_type']}, as {entry['codebook']}"
            for entry in described["parameters"]
        },
        "order of parameters": [entry["name"] for entry in described["parameters"]],
        "codebook": {key: _summary(fields) for key, fields in described["codebooks"].items()},
        "registry version": described["version"],
        "step": step,
        "statistics": levels.state_dict()["merged"],
    }


def _summary(codebook: Mapping[str, Any]) -> str:
    """A codebook in one line."""
    levels = hashlib.blake2b(json.dumps(codebook["levels"]).encode(), digest_size=4).hexdigest()
    return (
        f"{codebook['bits']} bits, bucket {codebook['bucket_size']}, {codebook['norm']} norm as "
        f"{codebook['norm_format']}, {codebook['level_scheme']} levels {levels} of version {codebook['version']}"
    )
