"""The examples for several hosts: sound as scripts and as YAML; run with stand-ins for the launchers, and for real."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "launch" / "cluster"
ON_HOSTS = CLUSTER / "train_on_hosts.sh"
DEEPSPEED_ON_HOSTS = CLUSTER / "deepspeed_on_hosts.sh"
TORCHRUN_ON_HOSTS = CLUSTER / "torchrun_on_hosts.sh"
HOROVOD_SLURM = CLUSTER / "horovod.sbatch"
TORCHRUN_SLURM = CLUSTER / "torchrun.sbatch"
SCRIPTS = [ON_HOSTS, DEEPSPEED_ON_HOSTS, TORCHRUN_ON_HOSTS, HOROVOD_SLURM, TORCHRUN_SLURM]
SHOW = '#!/bin/sh\nprintf "%s\\n" "$@"\n'


def run(
    command: list[str | Path], cwd: Path = ROOT, timeout: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def fake_programs(folder: Path, **contents: str) -> Path:
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    assert run(["bash", "-n", script]).returncode == 0
    assert os.access(script, os.X_OK)
    if shutil.which("shellcheck"):
        outcome = run(["shellcheck", "-x", script])
        assert outcome.returncode == 0, outcome.stdout


def test_hosts_are_read_from_the_hostfile(tmp_path: Path) -> None:
    programs = fake_programs(tmp_path / "bin", horovodrun=SHOW, python=SHOW)
    outcome = run(
        [ON_HOSTS, CLUSTER / "hostfile.example", "--bits", "4", "--data", "a folder"],
        PYTHON=str(programs / "python"),
        HOROVOD_INTERFACE="eth1",
        HOROVODRUN_ARGUMENTS="--ssh-port 2222",
    )
    assert outcome.returncode == 0, outcome.stderr
    shown = outcome.stdout.splitlines()
    assert shown[:7] == ["--gloo", "-np", "4", "-H", "node1:2,node2:2", "--network-interfaces", "eth1"]
    assert shown[7:9] == ["--ssh-port", "2222"]
    assert shown[-4:] == ["--bits", "4", "--data", "a folder"]
    assert Path(shown[-5]) == ROOT / "launch" / "train" / "mnist.py"


def test_a_program_of_the_users_is_started_on_the_hosts(tmp_path: Path) -> None:
    programs = fake_programs(tmp_path / "bin", horovodrun=SHOW, python=SHOW)
    program = ["python", "train.py", "--epochs", "5", "a name"]
    outcome = run(
        [ON_HOSTS, CLUSTER / "hostfile.example", "--", *program],
        cwd=tmp_path,
        PATH=f"{programs}:{os.environ['PATH']}",
    )
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.splitlines() == ["--gloo", "-np", "4", "-H", "node1:2,node2:2", *program]


@pytest.mark.parametrize("script", [ON_HOSTS, DEEPSPEED_ON_HOSTS, TORCHRUN_ON_HOSTS], ids=lambda path: path.name)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a hostfile"),
        (["absent"], "cannot read the hostfile absent"),
        ([CLUSTER / "hostfile.example", "--"], "give a program behind --"),
    ],
)
def test_a_wrong_call_is_refused(script: Path, arguments: list[str | Path], message: str) -> None:
    outcome = run([script, *arguments])
    assert outcome.returncode == 2
    assert f"{script.name}: {message}" in outcome.stderr


def test_an_environment_without_the_launcher_is_named(tmp_path: Path) -> None:
    programs = fake_programs(tmp_path / "bin", python=SHOW)
    for name in ("bash", "env", "dirname", "basename"):
        (programs / name).symlink_to(str(shutil.which(name)))
    for script, launcher in ((ON_HOSTS, "horovodrun"), (DEEPSPEED_ON_HOSTS, "deepspeed")):
        outcome = run([script, CLUSTER / "hostfile.example", "--", "python", "train.py"], PATH=str(programs))
        assert outcome.returncode == 2
        assert f"there is no {launcher} " in outcome.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("node1\n", "'node1' is not 'NAME slots=RANKS'"),
        ("node1 slots=0\n", "is not"),
        ("# nothing\n\n", "names no host"),
    ],
)
def test_a_wrong_hostfile_is_refused(tmp_path: Path, content: str, message: str) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text(content)
    outcome = run([ON_HOSTS, hostfile])
    assert outcome.returncode == 2
    assert message in outcome.stderr


def test_slurm_starts_as_many_ranks_as_the_job_has(tmp_path: Path) -> None:
    horovodrun = SHOW
    scontrol = '#!/bin/sh\ntest "$*" = "show hostnames n[3-4]" && printf "n3\\nn4\\n"\n'
    programs = fake_programs(tmp_path / "bin", horovodrun=horovodrun, scontrol=scontrol, python=SHOW)
    outcome = run(
        [HOROVOD_SLURM, "--steps", "9"],
        cwd=tmp_path,
        PATH=f"{programs}:{os.environ['PATH']}",
        PYTHON=str(programs / "python"),
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_NTASKS_PER_NODE="3",
        SLURM_CPUS_PER_TASK="4",
        SLURM_JOB_NODELIST="n[3-4]",
    )
    assert outcome.returncode == 0, outcome.stderr
    shown = outcome.stdout.splitlines()
    assert shown[:5] == ["--gloo", "-np", "6", "-H", "n3:3,n4:3"]
    assert shown[-4:] == ["--threads", "4", "--steps", "9"]


@pytest.mark.parametrize("is_own", [False, True], ids=["ours", "the user's"])
def test_deepspeed_gets_the_hostfile_and_the_program(tmp_path: Path, is_own: bool) -> None:
    programs = fake_programs(tmp_path / "bin", deepspeed=SHOW, python=SHOW)
    hostfile = CLUSTER / "hostfile.example"
    outcome = run(
        [DEEPSPEED_ON_HOSTS, hostfile, *(["--", "python", "train.py"] if is_own else ["--zero", "3"]), "--data", "a b"],
        PATH=f"{programs}:{os.environ['PATH']}",
        PYTHON=str(programs / "python"),
        MASTER_ADDR="10.0.0.1",
        DEEPSPEED_ARGUMENTS="--master_port 29501",
    )
    assert outcome.returncode == 0, outcome.stderr
    program = ["train.py"] if is_own else [str(ROOT / "launch" / "train" / "language_model.py"), "--zero", "3"]
    expected = ["--hostfile", str(hostfile), "--master_addr", "10.0.0.1", "--master_port", "29501", *program]
    assert outcome.stdout.splitlines() == [*expected, "--data", "a b"]


def test_torchrun_is_started_on_every_host(tmp_path: Path) -> None:
    ssh = f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/$4\n'  # its options are -tt -o BatchMode=yes
    programs = fake_programs(tmp_path / "bin", ssh=ssh, python=SHOW)
    work = tmp_path / "a folder"
    work.mkdir()
    outcome = run(
        [TORCHRUN_ON_HOSTS, CLUSTER / "hostfile.example", "--", "python", "train.py", "--name", "it's"],
        cwd=work,
        PATH=f"{programs}:{os.environ['PATH']}",
        INTERFACE="ib0",
    )
    assert outcome.returncode == 0, outcome.stderr
    for rank, name in enumerate(("node1", "node2")):
        *options, host, command = (tmp_path / name).read_text().splitlines()
        assert (options, host) == (["-tt", "-o", "BatchMode=yes"], name)
        # What a shell on the host would make of the line: its folder, and the words of its command.
        command = command.replace(" exec env ", " pwd && printf '%s\\n' ", 1)
        folder, *words = run(["bash", "-c", command]).stdout.splitlines()
        assert folder == str(work)
        assert "GLOO_SOCKET_IFNAME=ib0" in words
        begin = words.index(str(programs / "python"))
        assert words[begin + 1 : begin + 7] == [
            "-m",
            "torch.distributed.run",
            "--nnodes",
            "2",
            "--node-rank",
            str(rank),
        ]
        assert words[begin + 7 : begin + 11] == ["--nproc-per-node", "2", "--master-addr", "node1"]
        assert words[-3:] == ["train.py", "--name", "it's"]


def test_a_host_that_fails_ends_the_others(tmp_path: Path) -> None:
    ssh = f"#!/bin/sh\nif [ $4 = node1 ]; then exit 7; fi\necho $$ >{tmp_path}/other\nexec sleep 600\n"
    programs = fake_programs(tmp_path / "bin", ssh=ssh, python=SHOW)
    outcome = run(
        [TORCHRUN_ON_HOSTS, CLUSTER / "hostfile.example", "--", "python", "train.py"],
        PATH=f"{programs}:{os.environ['PATH']}",
    )
    assert outcome.returncode == 7, outcome.stderr
    other = tmp_path / "other"
    assert not other.exists() or not Path("/proc", other.read_text().strip()).exists()


@pytest.mark.parametrize("is_own", [False, True], ids=["ours", "the user's"])
def test_slurm_starts_torchrun_on_every_node(tmp_path: Path, is_own: bool) -> None:
    scontrol = '#!/bin/sh\nprintf "n3\\nn4\\n"\n'
    srun = '#!/bin/sh\nprintf "%s\\n" "$@" "cores $SRUN_CPUS_PER_TASK"\n'
    programs = fake_programs(tmp_path / "bin", srun=srun, scontrol=scontrol, python=SHOW)
    outcome = run(
        [TORCHRUN_SLURM, *(["--", "python", "train.py"] if is_own else ["--zero", "1"])],
        cwd=tmp_path,
        PATH=f"{programs}:{os.environ['PATH']}",
        PYTHON=str(programs / "python"),
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_NODELIST="n[3-4]",
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_ID="100077",
        SLURM_CPUS_PER_TASK="8",
    )
    assert outcome.returncode == 0, outcome.stderr
    shown = outcome.stdout.splitlines()
    assert shown[:6] == [str(programs / "python"), "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node"]
    program = ["train.py"] if is_own else [str(ROOT / "launch" / "train" / "language_model.py"), "--zero", "1"]
    assert shown[shown.index("--rdzv-endpoint") :] == ["--rdzv-endpoint", "n3:20077", *program, "cores 8"]


def test_the_kubernetes_job_is_complete() -> None:
    job, claim = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    replicas: dict[str, Any] = job["spec"]["mpiReplicaSpecs"]
    assert set(replicas) == {"Launcher", "Worker"}
    assert job["spec"]["slotsPerWorker"] == 2
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    (launcher,) = replicas["Launcher"]["template"]["spec"]["containers"]
    assert (ROOT / launcher["command"][0]).is_file()


def test_the_kubernetes_job_gives_options_that_exist() -> None:
    pytest.importorskip("horovod.torch")
    from launch.train.options import parse_options

    job = next(yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text()))
    (launcher,) = job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"]
    hostfile, *arguments = launcher["args"]
    assert hostfile == "/etc/mpi/hostfile"
    options = parse_options("", arguments)
    assert (options.bits, options.checkpoint_every) == (5, 500)


@pytest.mark.distributed
@pytest.mark.timeout(150)
def test_training_starts_from_a_hostfile_of_this_machine(tmp_path: Path) -> None:
    pytest.importorskip("horovod.torch")
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# this machine\nlocalhost slots=2\n")
    arguments = ["--steps", "3", "--compression", "none", "--model-size", "small", "--run-dir", tmp_path / "run"]
    outcome = run(
        [ON_HOSTS, hostfile, *arguments],
        timeout=120,
        PYTHON=sys.executable,
        HOROVOD_INTERFACE="lo",
        OMP_NUM_THREADS="1",
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert (tmp_path / "run" / "summary.json").is_file()
