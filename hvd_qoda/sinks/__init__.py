"""Sinks: where telemetry's records are written. None of them imports its tracker before it is used."""

from hvd_qoda.sinks.console import ConsoleSink
from hvd_qoda.sinks.json_lines import JsonLinesSink, read_json_lines, read_steps
from hvd_qoda.sinks.tensorboard import TensorBoardSink
from hvd_qoda.sinks.weights_and_biases import WandbSink

__all__ = ["ConsoleSink", "JsonLinesSink", "TensorBoardSink", "WandbSink", "read_json_lines", "read_steps"]
