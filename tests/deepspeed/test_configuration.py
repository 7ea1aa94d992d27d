"""The "qoda" block before a run: its errors, settings that are refused, the command line, DeepSpeed's version."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

import ds_plugin
from ds_plugin.__main__ import main
from ds_plugin.config import parse_block, read_file, refuse_unsupported
from ds_plugin.versions import HOOKS, check_version, missing_features
from hvd_qoda.config import QodaConfig
from hvd_qoda.errors import ConfigError, UnsupportedError

ROOT = Path(__file__).parents[2]


def test_the_block_is_the_shared_schema() -> None:
    block = {"bits": 4, "layers": [{"type": "embedding", "bits": 8}]}
    assert parse_block({"train_batch_size": 8, "qoda": block}) == QodaConfig(**block)
    assert parse_block({"qoda": {}}) == QodaConfig()
    assert parse_block({"train_batch_size": 8}) is None


def test_the_environment_overrides_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CGX_COMPRESSION_QUANTIZATION_BITS", "6")
    config = parse_block({"qoda": {"bits": 4, "bucket_size": 256}})
    assert config is not None
    assert (config.bits, config.bucket_size) == (6, 256)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"bitz": 5}, ["bitz: unknown key", "did you mean 'bits'"]),
        ({"bits": 9}, ["bits=9"]),
        ({"bits": "5"}, ["bits='5'"]),
        ([5], ["must map keys to values"]),
    ],
)
def test_mistakes_name_the_block_and_the_key(block: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_block({"qoda": block}, "ds.json")
    for word in ['ds.json, block "qoda"', *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "zero_quantized_gradients"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "mics_shard_size"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.device"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile"),
        ({"tensor_parallel": {"autotp_size": 2}}, "autotp_size"),
        ({"sparse_gradients": True}, "sparse_gradients"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(UnsupportedError, match=key):
        refuse_unsupported(settings, QodaConfig())


@pytest.mark.parametrize("exchange", ["off", "hierarchical"])
def test_exchanges_of_the_horovod_front_end_are_refused(exchange: str) -> None:
    with pytest.raises(UnsupportedError, match="exchange"):
        refuse_unsupported({}, QodaConfig(exchange=exchange))


def test_numbers_may_be_left_to_hugging_face_but_must_be_numbers() -> None:
    refuse_unsupported({"zero_optimization": {"zero_hpz_partition_size": "auto"}}, QodaConfig())
    with pytest.raises(ConfigError, match="stage must be an integer, got 'two'"):
        refuse_unsupported({"zero_optimization": {"stage": "two"}}, QodaConfig(worker_norms=True))


def test_what_is_no_engine() -> None:
    with pytest.raises(ConfigError, match="a Linear is no engine"):
        ds_plugin.require(torch.nn.Linear(2, 2))


def test_worker_norms_need_one_exchange_per_step() -> None:
    config = QodaConfig(worker_norms=True)
    with pytest.raises(UnsupportedError, match="gradient_accumulation_steps"):
        refuse_unsupported({"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 4}, config)
    refuse_unsupported({"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 4}, config)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, none = (tmp_path / f"{name}.json" for name in ("good", "bad", "none"))
    good.write_text(json.dumps({"qoda": {"bits": 4}}))
    bad.write_text(json.dumps({"qoda": {"bits": 40}}))
    none.write_text("{}")
    assert main(["check", str(good)]) == 0
    shown = capsys.readouterr().out
    assert "bits: 4" in shown
    assert "ds_plugin.require(engine)" in shown
    assert main(["check", str(bad)]) == 1
    assert "bits=40" in capsys.readouterr().err
    assert main(["check", str(none)]) == 1
    assert "uncompressed" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "absent.json")]) == 1


@pytest.mark.parametrize("key", ["Qoda", "QODA", "quoda", "qoda_"])
def test_a_misspelt_block_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"a key '{key}'; did you mean \"qoda\""):
        parse_block({"train_batch_size": 8, key: {"bits": 4}})


def test_the_command_line_looks_at_the_optimizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def check(**settings: Any) -> tuple[int, str, str]:
        path = tmp_path / "configuration.json"
        path.write_text(json.dumps({"qoda": {}, **settings}))
        status = main(["check", str(path)])
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    assert "optimizer: none here" in check()[1]
    for name in ("AdamW", "SGD", "QODAdam", "lamb"):
        status, out, _ = check(optimizer={"type": name})
        assert status == 0
        assert "none here" not in out
    status, _, error = check(optimizer={"type": "QODAdm"})
    assert status == 1
    assert "knows no 'QODAdm'; did you mean 'QODAdam'?" in error
    assert "knows no 'lr_scheduler'" in check(optimizer={"type": "lr_scheduler"})[2]
    assert 'must map "type"' in check(optimizer="Adam")[2]
    status, _, error = check(optimizer={"type": "auto", "params": {"lr": "auto"}})
    assert status == 1
    assert "filled in by nobody" in error
    assert '"AdamW" or "QODAdam"' in error


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"zero_optimization": {"stage": 7}}, ["zero_optimization.stage", "0 to 3", "7"]),
        ({"zero_optimization": {"stage": "2"}}, ["zero_optimization.stage", "'2'"]),
        ({"zero_optimization": {"stage": True}}, ["zero_optimization.stage"]),
        ({"zero_optimization": 2}, ["zero_optimization", "must map keys to values"]),
        ({"zero_optimization": {"offload_optimizer": ["cpu"]}}, ["zero_optimization.offload_optimizer"]),
        ({"fp16": [True]}, ["fp16", "must map keys to values"]),
        ({"optimizer": {"type": "OneBitAdam"}}, ["has removed", "AdamW", '"bits": 5']),
        ({"optimizer": {"type": "ZeroOneAdam"}}, ["has removed", "AdamW"]),
        ({"optimizer": {"type": "OneBitLamb"}}, ["has removed", "Lamb"]),
        ({"optimizer": {"type": "1-bit Adam"}}, ["has removed", "AdamW"]),
        ({"optimizer": {"type": "0/1 Adam"}}, ["has removed", "AdamW"]),
    ],
)
def test_the_command_line_names_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], words: list[str]
) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps({"qoda": {}, **settings}))
    assert main(["check", str(path)]) == 1
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


def test_the_command_line_says_what_deepspeed_does_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "configuration.json"
    path.write_text(json.dumps({"qoda": {"fusion_buffer_mb": 4}}))
    assert main(["check", str(path)]) == 0
    assert "fusion_buffer_mb: 4.0  (not read here" in capsys.readouterr().out


def test_the_block_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "qoda.yaml").write_text("bits: auto\nexchange: by_bytes\n")
    config = parse_block({"qoda": str(tmp_path / "qoda.yaml")})
    assert config is not None
    assert (config.bits, config.exchange) == ("auto", "by_bytes")
    with pytest.raises(ConfigError, match="nowhere"):
        parse_block({"qoda": str(tmp_path / "nowhere.yaml")})


def test_a_file_that_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text("[]")
    with pytest.raises(ConfigError, match="maps keys to values"):
        read_file(path)


def test_the_installed_deepspeed_has_every_hook() -> None:
    assert missing_features() == []


def test_a_moved_hook_is_noticed() -> None:
    hook = next(hook for hook in HOOKS if hook.method == "average_tensor")
    moved = dataclasses.replace(hook, method="average_tensors")
    other = dataclasses.replace(hook, parameters=("tensor",))
    inside = dataclasses.replace(hook, calls=("self.allreduce_and_gather(",))
    found = missing_features([hook, moved, other, inside])
    assert len(found) == 3
    assert "average_tensors does not exist" in found[0]
    assert "takes tensor, communication_data_type, expected tensor" in found[1]
    assert "does not contain 'self.allreduce_and_gather('" in found[2]


@pytest.mark.parametrize("version", ["0.19.7", "0.20.0", "unknown"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(UnsupportedError, match="works with DeepSpeed"):
        check_version(version)


def test_this_version_is_supported() -> None:
    check_version(deepspeed.__version__)


def test_the_plug_in_imports_without_deepspeed_but_without_its_functions() -> None:
    program = "import sys; sys.modules['deepspeed'] = None; import ds_plugin; print(hasattr(ds_plugin, 'require'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.strip() == "False", done.stderr
    assert hasattr(ds_plugin, "require")
