"""The house keeps its order: imports point down, hosts are optional, and nothing names a machine's paths."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "qoda_kernels": ROOT / "kernels" / "qoda_kernels",
    "hvd_qoda": ROOT / "hvd_qoda",
    "ds_plugin": ROOT / "ds_plugin",
    "launch": ROOT / "launch",
}
ABOVE = {
    "qoda_kernels": {"hvd_qoda", "ds_plugin", "launch", "tests"},
    "hvd_qoda": {"ds_plugin", "launch", "tests"},
    "ds_plugin": {"launch", "tests"},
    "launch": {"tests"},
}
# llvmlite is a part of Numba: its intrinsics are written in it. cuda is NVIDIA's binding that numba-cuda works with.
KERNELS_MAY_IMPORT = {"numpy", "numba", "llvmlite", "cuda", "torch", "qoda_kernels"}
TOP_LEVEL = {
    ".ci",
    ".containerignore",
    ".gitignore",
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "ds_plugin",
    "hvd_qoda",
    "kernels",
    "launch",
    "pyproject.toml",
    "tests",
}
CONSTRUCTORS = {
    "arange",
    "empty",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
}
HOSTS = ("horovod", "deepspeed", "wandb", "tensorboard")


def imported_modules(path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of_room(room: str) -> Iterator[tuple[Path, str]]:
    files = sorted(ROOMS[room].rglob("*.py"))
    assert files, f"{ROOMS[room]} holds no Python files"
    for path in files:
        for module in imported_modules(path):
            yield path.relative_to(ROOT), module


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [Path(name) for name in listed.stdout.split("\0") if name]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down(room: str) -> None:
    wrong = [f"{path}: {module}" for path, module in imports_of_room(room) if module.split(".")[0] in ABOVE[room]]
    assert wrong == []


def test_the_kernels_import_numpy_numba_and_torch_only() -> None:
    allowed = KERNELS_MAY_IMPORT | set(sys.stdlib_module_names)
    wrong = [
        f"{path}: {module}" for path, module in imports_of_room("qoda_kernels") if module.split(".")[0] not in allowed
    ]
    assert wrong == []


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "launch"])
def test_new_tensors_say_on_which_device(room: str) -> None:
    """After `torch.set_default_device("cuda")` those that do not would be where nobody expects them."""
    wrong = [
        f"{path}:{node.lineno}"
        for path in ROOMS[room].rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in CONSTRUCTORS
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and all(keyword.arg != "device" for keyword in node.keywords)
    ]
    assert wrong == []


def test_horovod_is_imported_in_its_own_room_only() -> None:
    allowed = ROOMS["hvd_qoda"].relative_to(ROOT) / "horovod"
    wrong = [
        f"{path}: {module}"
        for room in ("qoda_kernels", "hvd_qoda", "ds_plugin")
        for path, module in imports_of_room(room)
        if module.split(".")[0] == "horovod" and allowed not in path.parents
    ]
    assert wrong == []


def test_the_deepspeed_front_end_does_not_use_the_horovod_one() -> None:
    wrong = [f"{path}: {module}" for path, module in imports_of_room("ds_plugin") if ".horovod" in module]
    assert wrong == []


def test_the_library_needs_no_host_and_no_tracker() -> None:
    blocked = "\n".join(f"sys.modules[{host!r}] = None" for host in HOSTS)
    program = f"import sys\n{blocked}\nimport hvd_qoda, qoda_kernels, ds_plugin, hvd_qoda.optim, hvd_qoda.telemetry"
    outcome = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert outcome.returncode == 0, outcome.stderr


def test_only_the_agreed_entries_are_at_the_top() -> None:
    found = {path.parts[0] for path in tracked_files()}
    assert found <= TOP_LEVEL, f"new top-level entries: {sorted(found - TOP_LEVEL)}"


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    # Composed, so that this file is searched like all others.
    pattern = re.compile(r"(?<![\w.}])/(?:" + "|".join(["work", "tmp", "home"]) + r")/\w")
    wrong = []
    for path in tracked_files():
        if not (ROOT / path).is_file() or path.suffix in {".png", ".whl", ".gz"}:
            continue
        for number, line in enumerate((ROOT / path).read_text(errors="replace").splitlines(), start=1):
            if pattern.search(line):
                wrong.append(f"{path}:{number}: {line.strip()}")
    assert wrong == []
