"""The wheel holds the three packages, typed, and nothing else; what it installs imports by itself."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hvd_qoda", "ds_plugin", "qoda_kernels")
SOURCES = ("hvd_qoda", "ds_plugin", "kernels", "pyproject.toml", "README.md", "LICENSE")


def build(source: Path, out: Path) -> Path:
    """Build a wheel of a folder as `pip install` does."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), str(source)], check=True, timeout=120)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, because builds may leave files behind."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, source / name)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    modules = {name for name in names if ".dist-info/" not in name}
    folders = (ROOT / "hvd_qoda", ROOT / "ds_plugin", ROOT / "kernels" / "qoda_kernels")
    expected = {
        str(path.relative_to(folder.parent))
        for folder in folders
        for path in (*folder.rglob("*.py"), *folder.rglob("py.typed"))
    }
    assert modules == expected
    assert {f"{package}/py.typed" for package in PACKAGES} <= modules
    assert any(name.endswith("/LICENSE") for name in names)


def test_a_second_wheel_does_not_hold_what_was_deleted(source: Path, wheel: Path, tmp_path: Path) -> None:
    """Someone updates a clone and installs it again."""
    deleted = source / "hvd_qoda" / "errors.py"
    content = deleted.read_bytes()
    deleted.unlink()
    try:
        names = zipfile.ZipFile(build(source, tmp_path)).namelist()
    finally:
        deleted.write_bytes(content)
    assert "hvd_qoda/errors.py" not in names
    assert "hvd_qoda/errors.py" in zipfile.ZipFile(wheel).namelist()


def test_what_it_installs_imports_by_itself(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import {', '.join(PACKAGES)}; print(hvd_qoda.__file__)"
    )
    # Without hosts and trackers: base dependencies are enough.
    hidden = "import sys; sys.modules.update(dict.fromkeys(['horovod', 'wandb', 'numba_cuda']))\n"
    done = subprocess.run(
        [sys.executable, "-c", hidden + program], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )
    assert Path(done.stdout.strip().splitlines()[-1]).is_relative_to(tmp_path)
