"""The program that builds Horovod's wheel refuses what it cannot patch, before it builds anything."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "launch" / "build_horovod.sh"


def build(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(PROGRAM), "--python", sys.executable, "--no-cache", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_another_version_is_refused_by_its_checksum(tmp_path: Path) -> None:
    other = tmp_path / "horovod-0.28.1.tar.gz"
    other.write_bytes(b"not Horovod's")
    outcome = build("--sdist", str(other), "--out", str(tmp_path / "wheels"))
    assert outcome.returncode != 0
    assert "is not the file of Horovod 0.28.1 that this program can patch" in outcome.stderr
    assert not list(tmp_path.rglob("*.whl"))


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--sdist", "absent.tar.gz"], {}, "there is no file 'absent.tar.gz'"),
        (["--out"], {}, "--out needs a value"),
        (["--fast"], {}, "unknown option '--fast'"),
        ([], {"HOROVOD_WITHOUT_GLOO": "1"}, "HOROVOD_WITHOUT_GLOO=1 leaves no way to talk"),
        ([], {"CXX": "no-such-compiler"}, "'no-such-compiler' was not found"),
    ],
)
def test_mistakes_are_named(arguments: list[str], environment: dict[str, str], message: str) -> None:
    outcome = build(*arguments, **environment)
    assert outcome.returncode != 0
    assert message in outcome.stderr


def test_a_python_without_torch_is_named(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    venv.create(bare, with_pip=False)
    outcome = build("--python", str(bare / "bin" / "python"))
    assert outcome.returncode != 0
    assert "has no PyTorch: install it first" in outcome.stderr
