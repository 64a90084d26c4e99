"""The launch scripts, with the programs of `fake_cloud.py` in place of Google's and of a host's.

What a TPU, a real queue or a real preemption does is not tested here, nor anywhere.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
SETUP = HERE.parent / "tpu_setup"
CONFIG = "configs/my_run.yaml"
SCRIPTS = ("create", "bootstrap", "run", "status", "logs", "stop", "watch", "delete")
FAKE = f"exec {sys.executable} -I -S {HERE / 'fake_cloud.py'}"
# Programs of the user's machine and of a host, for sh.
PROGRAMS = {
    "gcloud": f'{FAKE} gcloud "$@"',
    "systemd-run": f'{FAKE} systemd-run "$@"',
    "hostname": "echo $FAKE_HOST",
    "sudo": 'exec "$@"',
    "systemctl": """
case $1 in
    is-active) [ -e "$HOME/unit.pid" ] ;;
    stop)
        kill "$(cat "$HOME/unit.pid")"
        while [ -e "$HOME/unit.pid" ]; do sleep 0.02; done
        ;;
esac
""",
    "uv": f"""
echo "$@" >>"$HOME/uv.txt"
case $1$2 in
    venv*)
        for folder; do :; done
        mkdir -p "$folder/bin"
        echo '#!/bin/sh
            case $1 in */chips.py) echo "$@"; exit ;; esac
            exec {sys.executable} -S "$@"' >"$folder/bin/python"
        echo '#!/bin/sh
            exec {sys.executable} -S {HERE / "fake_train.py"} "$@"' >"$folder/bin/ddk"
        chmod +x "$folder/bin/python" "$folder/bin/ddk"
        ;;
    pipfreeze) printf '%s\\n' jax==0.12.0 '-e file:///source' flax==0.12.12 ;;
esac
""",
}
SETTINGS = {
    "PROJECT": "my-project",
    "ZONE": "us-central2-b",
    "NAME": "ddk-1",
    "ACCELERATOR": "v4-16",
    "BUCKET": "my-bucket",
    "CONFIG": CONFIG,
    "ARGS": "--train.micro-rows 8 --mesh.fsdp 8",
    "PYTHON": f"{sys.version_info[0]}.{sys.version_info[1]}",
}
RUN_DIR = "gs/my-bucket/runs/ddk-1"


class Said(NamedTuple):
    """What a script came to."""

    code: int
    out: str
    err: str


class Cloud(NamedTuple):
    """A world, and the scripts in it."""

    world: Path
    env: dict[str, str]
    setup: Path

    def __call__(self, name: str, *words: str) -> Said:
        command = [str(self.setup / f"{name}.sh"), "--env", str(self.world / "env"), *words]
        done = subprocess.run(
            command, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        return Said(done.returncode, done.stdout, done.stderr)

    def set(self, **settings: str) -> None:
        lines = [f"{key}={value}\n" for key, value in (SETTINGS | settings).items()]
        self.put("env", "".join(lines))

    def put(self, name: str, text: str) -> None:
        (self.world / name).parent.mkdir(parents=True, exist_ok=True)
        (self.world / name).write_text(text)

    def has(self, name: str) -> bool:
        return (self.world / name).exists()

    def calls(self) -> list[list[str]]:
        """What `gcloud` was called with; of equal calls one after the other, the first."""
        if not self.has("calls"):
            return []
        calls = [line.split("\t") for line in (self.world / "calls").read_text().splitlines()]
        return [call for call, _ in itertools.groupby(calls)]

    def story(self) -> list[str]:
        return [in_short(call) for call in self.calls()]


def in_short(call: list[str]) -> str:
    """A call of `gcloud` without its options: `request create`, `node describe`, `ssh status`."""
    if call[0] == "storage":
        return f"storage {call[1]}"
    kind, verb = call[call.index("tpus") + 1 :][:2]
    if verb == "ssh":
        return "ssh " + "".join(re.findall(r"host\.sh (\w+)", call[-1])[:1])
    return f"{'request' if kind == 'queued-resources' else 'node'} {verb}"


def commands(text: str) -> list[list[str]]:
    """What a dry run printed, read as a shell would."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    words = [shlex.split(line) for line in lines]
    assert {line[0] for line in words} == {"gcloud"}
    return [call for call, _ in itertools.groupby(line[1:] for line in words)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small git checkout with the scripts and a config."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(SETUP, root / "tpu_setup", ignore=shutil.ignore_patterns("env", "__pycache__"))
    (root / CONFIG).parent.mkdir()
    (root / CONFIG).write_text("run: {dir: runs/my_run}\n")
    (root / "ignored.bin").write_text("")
    (root / ".gitignore").write_text("*.bin\n")
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    return root


@pytest.fixture
def cloud(tmp_path: Path, checkout: Path) -> Cloud:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, lines in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/sh\n{lines}\n")
        (programs / name).chmod(0o755)
    env = {
        "PATH": f"{programs}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "FAKE_CLOUD": str(tmp_path),
        "TMPDIR": str(tmp_path),
    }
    made = Cloud(tmp_path, env, checkout / "tpu_setup")
    made.set()
    return made


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


# --- what every script does ---


def test_shellcheck_finds_nothing():
    paths = sorted(SETUP.glob("*.sh"))
    assert len(paths) == len(SCRIPTS) + 4
    command = [str(Path(sys.executable).parent / "shellcheck")]
    done = subprocess.run([*command, *map(str, paths)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_every_option_and_calls_nothing(cloud, name):
    said = cloud(name, "--help")
    assert said.code == 0 and said.err == "" and not cloud.has("calls")
    assert said.out.startswith(f"{name}.sh")
    source = (SETUP / f"{name}.sh").read_text()
    labels = re.findall(r"^ {8}(--[a-z-]+(?: \| --[a-z-]+)*)\)", source, re.M)
    options = {"--env", "--dry-run", *(" | ".join(labels).split(" | ") if labels else [])}
    assert [option for option in options if option not in said.out] == []


def test_no_script_needs_a_newer_bash_than_that_of_a_mac():
    newer = r"mapfile|readarray|declare -A|local -A|wait -n|\$\{\w+(,,|\^\^|@Q)|&>>|\|&|coproc"
    for path in SETUP.glob("*.sh"):
        assert re.findall(newer, path.read_text()) == [], path


BAD = {
    "PROJECT": ["", "Caps", "a b", "my-project;id"],
    "ZONE": ["us-central2", "us-central2-b --quiet"],
    "NAME": [
        "",
        "-rf",
        "Upper",
        "x; touch pwned",
        "x$(touch pwned)",
        "x`touch pwned`",
        "x && touch pwned",
        "x'y",
        'x"y',
        "a" * 41,
        "../x",
    ],
    "ACCELERATOR": ["v5e-16", "tpu7x-16", "v4-12", "v5litepod-5", "v2-8", "v6e-016"],
    "PROVISIONING": ["cheap", "--spot"],
    "SLICES": ["0", "two", "-1"],
    "VALID": ["24", "1 h"],
    "BUCKET": ["gs://my-bucket", "My_Bucket", ""],
    "CONFIG": ["", "/etc/passwd", "../x.yaml", "configs/none.yaml", "configs/$(id).yaml"],
    "RUN_DIR": ["runs/x", "gs://b", "s3://bucket/x", "gs://bucket/x y", "/mnt/$(id)"],
    "ARGS": ["--a $(touch pwned)", "--a 'b'", "--a *", "--a 1;id", "--a\t1"],
    "SYNC": ["data", "gs://bucket/a=../b", "gs://bucket/a=/etc", "gs://bucket/a=b;id"],
    "PACKAGE": ["ddk_jax; id", "git+https://token@host/a/b", "git+ssh://host/a/b"],
    "EXTRAS": ["tpu]", "tpu, gcs"],
    "PYTHON": ["3.10", "3", "python3.12"],
    "RUNTIME": ["-x", "v2 alpha"],
    "LIBTPU_INIT_ARGS": ["xla=1", "--xla=$(id)"],
    "STARTUP_SCRIPT": ["/nowhere/startup.sh"],
    "NETWORK": ["-n", "a b"],
    "SERVICE_ACCOUNT": ["me", "me@x.com,you"],
    "SSH": ["tunnel"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(k, v) for k, vs in BAD.items() for v in vs], ids=lambda x: x or "empty"
)
def test_a_bad_setting_is_refused_in_one_line_before_anything_is_done(cloud, key, value):
    cloud.set(**{key: value})
    said = cloud("create")
    assert said.code == 64 and said.out == "" and not cloud.has("calls")
    assert said.err.count("\n") == 1 and f"{key}=" in said.err
    assert not cloud.has("pwned")


def test_every_setting_is_explained_and_checked():
    lines = re.findall(r'^KEYS="(?:\$KEYS )?(.*)"', (SETUP / "settings.sh").read_text(), re.M)
    keys = re.findall(r"^([A-Z_]+)=", (SETUP / "env.example").read_text(), re.M)
    assert sorted(" ".join(lines).split()) == sorted(keys)
    assert set(BAD) == set(keys) - {"SUBNETWORK"}  # which is as NETWORK is


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("export NAME=x", "line 9: is not KEY=value"),
        ("touch pwned", "line 9: is not KEY=value"),
        ("TPU_NAME=x", "line 9: sets TPU_NAME, which is no setting"),
        ("PROJECT ZONE=x", "line 9: is not KEY=value"),
    ],
)
def test_the_settings_are_read_and_not_executed(cloud, line, words):
    cloud.set()
    cloud.put("env", (cloud.world / "env").read_text() + line + "\n")
    said = cloud("run")
    assert said.code == 64 and words in said.err and not cloud.has("pwned")


def test_values_may_have_quotes_and_comments(cloud):
    cloud.set(ZONE='"us-central2-b"', NAME="'ddk-1'", BUCKET="my-bucket   # in us-central2")
    assert cloud("status", "--dry-run").code == 0


def test_missing_settings_and_unknown_options_are_one_line(cloud):
    (cloud.world / "env").unlink()
    said = cloud("create")
    assert said.code == 64 and "env.example" in said.err and said.err.count("\n") == 1
    said = cloud("create", "--now")
    assert said.code == 64 and "--now" in said.err and said.err.count("\n") == 1
    assert cloud("create", "--timeout").code == cloud("create", "--timeout", "1h").code == 64


def test_the_example_is_a_complete_setting(cloud):
    cloud.put("env", (SETUP / "env.example").read_text())
    assert cloud("create", "--dry-run").code == 0


# --- dry runs ---


def ready(cloud: Cloud, hosts: int = 1, **settings: str) -> None:
    """Hosts that are there; their machines are folders."""
    cloud.set(ACCELERATOR=f"v4-{8 * hosts}", **settings)
    cloud.put("request", "ACTIVE\n")
    cloud.put("hosts", str(hosts))


@pytest.mark.parametrize("settings", [{"SSH": "iap"}, {"SLICES": "2"}], ids=["slice", "slices"])
def test_a_dry_run_prints_what_a_real_one_does(cloud, settings):
    cloud.set(**settings)
    cloud.put("hosts", "1")
    cloud.put("creations/0", "WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    options = {"create": ["--poll", "0"], "logs": ["--worker", "0"], "delete": ["--yes"]}
    for name in ("create", "bootstrap", "run", "status", "stop", "logs", "delete"):
        before = len(cloud.calls())
        dry = cloud(name, "--dry-run", *options.get(name, []))
        assert dry.code == 0 and len(cloud.calls()) == before, name
        real = cloud(name, *options.get(name, []))
        assert real.code == 0, (name, real.err)
        printed, done = commands(dry.out), cloud.calls()[before:]
        if settings.get("SLICES") and name != "create":  # slices are served at the same time
            printed, done = sorted(printed), sorted(done)
        assert printed == done, name


def test_a_dry_run_of_watch_prints_a_look_and_what_follows_a_preemption(cloud):
    said = cloud("watch", "--dry-run")
    assert said.code == 0 and not cloud.has("calls")
    assert [in_short(call) for call in commands(said.out)] == [
        *["request describe", "node describe", "ssh status"],
        *["request describe", "request delete", "node describe", "request list", "node list"],
        *["request describe", "request create", "request describe"],
        *["ssh install", "ssh chips", "ssh doctor", "ssh start"],
    ]


def test_an_interrupt_ends_what_runs_on_several_slices(cloud):
    cloud.set(SLICES="2")
    line = f"echo $$ >>{cloud.world}/pids; exec sleep 60"
    (cloud.world / "bin/gcloud").write_text(f"#!/bin/sh\n{line}\n")
    # As from a terminal: tests that a shell started in the background inherit a SIGINT that is
    # ignored, and a script cannot trap one of those.
    code = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    script = [cloud.setup / "logs.sh", "--env", cloud.world / "env", "--follow"]
    command = [sys.executable, "-c", code, *script]
    process = subprocess.Popen(command, env=cloud.env, stdin=subprocess.DEVNULL)
    pids = cloud.world / "pids"
    wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    wait_for(lambda: all(ended(int(pid)) for pid in pids.read_text().split()))


# --- create ---


def test_create_asks_once_and_tells_every_state(cloud):
    cloud.put("creations/0", "ACCEPTED\nWAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    said = cloud("create", "--poll", "0")
    assert said.code == 0
    told = re.findall(r"\d ([A-Z_]+)$", said.err, re.M)
    assert told == ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    create = next(call for call in cloud.calls() if "create" in call)
    assert create[:4] == ["compute", "tpus", "queued-resources", "create"]
    assert set(create[4:]) == {
        "ddk-1",
        "--project=my-project",
        "--zone=us-central2-b",
        "--accelerator-type=v4-16",
        "--runtime-version=tpu-ubuntu2204-base",
        "--node-id=ddk-1",
        "--spot",
        "--valid-until-duration=24h",
        "--labels=ddk-run=ddk-1",
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
        f"--metadata-from-file=startup-script={cloud.setup / 'startup.sh'}",
        "--quiet",
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"PROVISIONING": "on-demand"}, []),
        ({"PROVISIONING": "reserved"}, ["--reserved"]),
        ({"SLICES": "2"}, ["--spot", "--node-count=2", "--node-prefix=ddk-1"]),
        ({"ACCELERATOR": "v5litepod-8"}, ["--spot", "--runtime-version=v2-alpha-tpuv5-lite"]),
        ({"ACCELERATOR": "v5p-16"}, ["--spot", "--runtime-version=v2-alpha-tpuv5"]),
        ({"ACCELERATOR": "v6e-8"}, ["--spot", "--runtime-version=v2-alpha-tpuv6e"]),
        ({"SSH": "iap", "NETWORK": "n", "SUBNETWORK": "s"}, ["--spot", "--internal-ips"]),
        ({"SERVICE_ACCOUNT": "ddk@my-project.iam.gserviceaccount.com"}, ["--spot"]),
    ],
)
def test_settings_become_options_of_create(cloud, settings, words):
    cloud.set(**settings)
    (_, create, _) = commands(cloud("create", "--dry-run").out)
    assert set(words) <= set(create)
    assert ("--spot" in create) == ("--spot" in words)
    for key in ("NETWORK", "SUBNETWORK", "SERVICE_ACCOUNT"):
        option = f"--{key.lower().replace('_', '-')}={settings.get(key)}"
        assert (option in create) == (key in settings)


def test_an_option_overrides_the_provisioning(cloud):
    assert "--spot" not in cloud("create", "--dry-run", "--on-demand").out
    assert "--reserved" in cloud("create", "--dry-run", "--reserved").out


def test_create_goes_on_with_an_earlier_request(cloud):
    cloud.put("request", "WAITING_FOR_RESOURCES\nACTIVE\n")
    assert cloud("create", "--poll", "0").code == 0
    assert cloud.story() == ["request describe"]


@pytest.mark.parametrize("states", ["WAITING_FOR_RESOURCES\nFAILED\n", "SUSPENDING\nSUSPENDED\n"])
def test_create_says_why_a_request_was_not_served(cloud, states):
    cloud.put("creations/0", states)
    said = cloud("create", "--poll", "0")
    assert said.code == 2 and "delete.sh" in said.err
    assert "--format=yaml(state)" in cloud.calls()[-1]


def test_create_stops_waiting_and_says_what_to_do(cloud):
    cloud.put("creations/0", "WAITING_FOR_RESOURCES\n")
    said = cloud("create", "--poll", "1", "--timeout", "1")
    assert said.code == 2 and "create.sh goes on waiting" in said.err


def test_create_survives_failing_looks_but_not_a_refused_request(cloud):
    cloud.put("creations/0", "PROVISIONING\nACTIVE\n")
    cloud.put("failures", "queued-resources create\n")
    said = cloud("create", "--poll", "0")
    assert said.code == 1 and "UNAVAILABLE" in said.err
    cloud.put("request", "PROVISIONING\nACTIVE\n")
    cloud.put("failures", "nothing\n")
    process = cloud("create", "--poll", "0")
    assert process.code == 0
    cloud.put("request", "PROVISIONING\n")
    cloud.put("failures", "describe\n" * 20)
    assert cloud("create", "--poll", "0").code == 1


# --- delete ---


def test_delete_leaves_nothing(cloud):
    cloud.put("request", "ACTIVE\n")
    said = cloud("delete", "--yes")
    assert said.code == 0 and "nothing of ddk-1 is left" in said.err
    assert "gs://my-bucket/runs/ddk-1" in said.err
    assert cloud.story() == [
        *["request describe", "request delete", "node describe", "request list", "node list"]
    ]


def test_delete_finds_a_node_without_a_request(cloud):
    cloud.put("node", "READY\n")
    assert cloud("delete", "--yes").code == 0
    assert "node delete" in cloud.story() and "request delete" not in cloud.story()


def test_delete_looks_at_what_there_is_and_not_at_what_it_asked_for(cloud):
    cloud.put("request", "ACTIVE\n")
    cloud.put("leftovers", "ddk-1\n")
    said = cloud("delete", "--yes")
    assert said.code == 1 and "still there" in said.err and "tpu-vm/ddk-1" in said.err


def test_delete_does_not_take_a_silent_gcloud_for_an_empty_project(cloud):
    cloud.put("request", "ACTIVE\n")
    for part in ("queued-resources describe", "tpu-vm describe", "queued-resources list"):
        cloud.put("failures", f"{part}\n")
        assert cloud("delete", "--yes").code == 1


def test_delete_asks_first(cloud):
    cloud.put("request", "ACTIVE\n")
    said = cloud("delete")
    assert said.code == 64 and "--yes" in said.err and not cloud.has("calls")


# --- hosts ---


def states(cloud: Cloud) -> list[str]:
    """State of the run on every host, in their order."""
    lines = sorted(line for line in cloud("status").out.splitlines() if "ddk-status" in line)
    return [re.findall(r" state=(\w+)", line)[0] for line in lines]


def test_a_run_from_bootstrap_to_the_end(cloud):
    ready(cloud, 2, SYNC="gs://my-bucket/data/x=data/x", LIBTPU_INIT_ARGS="--xla_a=1 --xla_b=2")
    cloud.put("gs/my-bucket/data/x/manifest.json", "{}")
    assert states(cloud) == ["none", "none"]
    said = cloud("bootstrap")
    assert said.code == 0, said.err
    assert "2 8" in said.out  # chips.py with hosts and chips
    machine = cloud.world / "machines" / "ddk-1-w-1"
    assert (machine / "ddk/source/tpu_setup/host.sh").exists()
    assert not (machine / "ddk/source/ignored.bin").exists()
    assert (machine / "ddk/work/data/x/manifest.json").exists()
    assert f"-e {machine}/ddk/source[tpu,gcs]" in (machine / "uv.txt").read_text()
    assert "doctor" in said.out and f"{machine}/ddk/source/{CONFIG}" in said.out
    pins = cloud.world / "gs/my-bucket/ddk/ddk-1/pins.txt"
    assert pins.read_text() == "jax==0.12.0\nflax==0.12.12\n"

    cloud.put("hold", "")
    assert cloud("run").code == 0
    wait_for(lambda: cloud.has(f"{RUN_DIR}/checkpoints/1"))
    assert states(cloud) == ["running", "running"]
    assert cloud("run").code == 0  # again: nothing happens
    said = cloud("bootstrap", "--staged")
    assert said.code == 1 and "a run is going on here" in said.err
    unit = (machine / "systemd-run.txt").read_text().split("\n")
    assert "--property=LimitMEMLOCK=infinity" in unit and "--property=KillMode=mixed" in unit

    assert cloud("stop").code == 0
    assert states(cloud) == ["stopped", "stopped"]
    said = cloud("logs", "--worker", "all", "--lines", "100")
    assert "ddk-1-w-0: stopped and saved at step" in said.out
    assert "--train.micro-rows 8 --mesh.fsdp 8 --xla_a=1 --xla_b=2" in said.out
    assert cloud.has("gs/my-bucket/ddk/ddk-1/logs/ddk-1-w-1.txt")

    (cloud.world / "hold").unlink()
    assert cloud("run").code == 0
    wait_for(lambda: states(cloud) == ["finished", "finished"])
    assert re.search("continuing from [123]", cloud("logs").out)


def test_hosts_that_come_later_get_the_pinned_versions(cloud):
    ready(cloud)
    cloud.put("gs/my-bucket/ddk/ddk-1/pins.txt", "jax==0.12.0\n")
    assert cloud("bootstrap").code == 0
    assert "--constraint" not in (cloud.world / "machines/ddk-1-w-0/uv.txt").read_text()
    cloud.put("gs/my-bucket/ddk/ddk-1/pins.txt", "jax==0.11.0\n")
    assert cloud("bootstrap", "--staged").code == 0
    assert "--constraint" in (cloud.world / "machines/ddk-1-w-0/uv.txt").read_text()
    assert (cloud.world / "machines/ddk-1-w-0/ddk/pins.txt").read_text() == "jax==0.11.0\n"
    assert cloud.story().count("ssh pin") == 1


def test_a_package_from_elsewhere_is_installed_in_place_of_the_checkout(cloud):
    ready(cloud, PACKAGE="git+https://github.com/o/r@v1.0", EXTRAS="tpu,hf-datasets")
    assert cloud("bootstrap").code == 0
    words = (cloud.world / "machines/ddk-1-w-0/uv.txt").read_text()
    assert (
        "ddk_jax[tpu,hf-datasets] @ git+https://github.com/o/r@v1.0" in words
        and " -e " not in words
    )


def test_bootstrap_fails_where_the_bucket_cannot_be_written(cloud):
    ready(cloud)
    cloud.put("failures", "storage cp\n")
    said = cloud("bootstrap")
    assert said.code == 1 and "cannot write to gs://my-bucket/ddk/ddk-1" in said.err
    assert "ssh install" not in cloud.story()


def test_a_host_that_was_started_anew_is_dead(cloud):
    ready(cloud, 2)
    cloud.put("machines/ddk-1-w-0/ddk/state.txt", "state=running\nstep=7\n")
    cloud.put("machines/ddk-1-w-1/ddk/state.txt", "state=failed\ncode=70\nstep=7\n")
    cloud("bootstrap")
    assert states(cloud) == ["dead", "failed"]


@pytest.fixture(scope="module")
def chips() -> Callable[..., int]:
    """`chips.py` with its words, in this process."""
    spec = importlib.util.spec_from_file_location("chips", SETUP / "chips.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*words: str) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["chips.py", *words])
            return module.main()

    return call


def test_a_host_sees_its_chips_and_they_work_together(chips, capsys):
    assert chips("1", "8") == 0
    assert "host 0 of 1, 8 of 8 chips" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["1", "16"], "8 chips are there, 16 were asked for"),
        (["4", "16"], ""),  # jax finds no cluster here, and says so in its words
    ],
)
def test_missing_chips_and_hosts_are_one_line(chips, capsys, words, message):
    assert chips(*words) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


# --- watch ---


def answer(cloud: Cloud, *answers: str) -> None:
    """What the hosts say when they are asked, one after the other: `STATE CODE STEP REQUESTED`."""
    for number, text in enumerate(answers):
        cloud.put(f"answers/{number}", f"{text}\n{text}\n")


RENEWED = [
    *["request describe", "request delete", "node describe", "request list", "node list"],
    *["request describe", "request create", "request describe"],
]
STAGED = ["ssh install", "ssh chips", "ssh doctor", "ssh start"]
FRESH = ["storage cp", "ssh install", "ssh chips", "ssh doctor", "ssh pin", "ssh start"]
LOOK = ["request describe", "node describe", "ssh status"]


def test_watch_does_everything_from_nothing(cloud):
    answer(cloud, "running", "running - 1000", "finished 0 2000")
    said = cloud("watch", "--poll", "0")
    assert said.code == 0 and "the run is finished" in said.err
    assert cloud.story() == [
        *["request describe", "storage objects"],
        *[word for word in RENEWED if word != "request delete"],
        *FRESH,
        *LOOK * 3,
    ]


def test_watch_renews_a_suspended_request_and_the_run_continues(cloud):
    cloud.put("gs/my-bucket/ddk/ddk-1/source.tar.gz", "")
    cloud.put("request", "ACTIVE\nACTIVE\nSUSPENDING\nSUSPENDED\n")
    cloud.put("creations/0", "WAITING_FOR_RESOURCES\nFAILED\n")
    cloud.put("creations/1", "WAITING_FOR_RESOURCES\nACTIVE\n")
    answer(cloud, "running - 500", "running - 600", "finished 0 2000")
    said = cloud("watch", "--poll", "0", "--delete-when-done")
    assert said.code == 0, said.err
    story = cloud.story()
    assert story.count("request create") == 2 and story.count("request delete") == 3
    assert [word for word in story if word in STAGED] == STAGED  # once, and not FRESH
    assert story[-5:] == RENEWED[:5] and not cloud.has("request")


def test_watch_renews_a_node_that_is_gone(cloud):
    cloud.put("gs/my-bucket/ddk/ddk-1/source.tar.gz", "")
    cloud.put("request", "ACTIVE\n")
    cloud.put("node", "READY\nREPAIRING\nPREEMPTED\n")
    answer(cloud, "running", "finished")
    said = cloud("watch", "--poll", "0")
    assert said.code == 0 and "node ddk-1 is PREEMPTED" in said.err
    assert cloud.story().count("request create") == 1


def test_watch_survives_failures_of_gcloud(cloud):
    cloud.put("gs/my-bucket/ddk/ddk-1/source.tar.gz", "")
    cloud.put("request", "SUSPENDED\n")
    failures = ["describe", "objects", "queued-resources delete", "describe", "create", "doctor"]
    cloud.put("failures", "".join(f"{part}\n" for part in [*failures, "host.sh status"]))
    answer(cloud, "none", "running", "finished")
    said = cloud("watch", "--poll", "0")
    assert said.code == 0, said.err
    assert cloud.has("failures") and (cloud.world / "failures").read_text() == ""


def test_watch_gives_up_in_the_end_and_leaves_the_tpu_alone(cloud):
    cloud.put("request", "ACTIVE\n")
    cloud.put("failures", "describe\n" * 9)
    said = cloud("watch", "--poll", "0", "--max-failures", "3")
    assert said.code == 1 and "gave up after 3 failures" in said.err
    assert "request delete" not in cloud.story()


def test_watch_ends_with_a_run_that_would_fail_again(cloud):
    cloud.put("request", "ACTIVE\n")
    cloud.put("answers/0", "waiting 134 500\nfailed 70 500\n")
    said = cloud("watch", "--poll", "0", "--delete-when-done")
    assert said.code == 70 and "ssh start" not in cloud.story() and not cloud.has("request")


def test_watch_and_the_supervisor_agree_on_what_would_fail_again():
    (labels,) = re.findall(r"^ +(3 \|[0-9 |]+)\)", (SETUP / "watch.sh").read_text(), re.M)
    (final,) = re.findall(r"^FINAL = {(.*)}", (SETUP / "supervise.py").read_text(), re.M)
    assert {"0", *labels.split(" | ")} == set(final.split(", "))


def test_watch_tries_another_tpu_once_when_a_run_keeps_crashing(cloud):
    cloud.put("request", "ACTIVE\n")
    answer(cloud, "running - 500", "failed 134 500", "running - 500", "failed 134 500")
    said = cloud("watch", "--poll", "0")
    assert said.code == 134 and "crashed on two TPUs" in said.err
    assert cloud.story().count("request create") == 1 and "costs on" in said.err


def test_watch_starts_again_what_is_dead_and_not_what_the_user_stopped(cloud):
    cloud.put("request", "ACTIVE\n")
    cloud.put("answers/0", "running - 5\ndead - 5\n")
    cloud.put("answers/1", "stopped 0 6 yes\nstopped 0 6 yes\n")
    said = cloud("watch", "--poll", "0")
    assert said.code == 0 and "stopped by stop.sh" in said.err
    story = cloud.story()
    assert story[story.index("ssh stop") + 1 :][: len(FRESH)] == FRESH
    assert "host.sh stop --again" in str(cloud.calls())


def test_watch_gives_up_a_run_that_does_not_get_on(cloud):
    cloud.put("request", "ACTIVE\n")
    answer(cloud, "stopped 0 6")
    said = cloud("watch", "--poll", "0")
    assert said.code == 1 and "gave up after 5 starts" in said.err
    assert cloud.story().count("ssh start") == 5


def test_a_preempted_run_continues_from_its_checkpoint_on_new_hosts(cloud):
    cloud.set(ACCELERATOR="v4-8")
    cloud.put("hosts", "1")
    cloud.put("hold", "")
    first = "my-bucket/runs/ddk-1/checkpoints/1"
    cloud.put("creations/0", f"ACTIVE until {first}\nSUSPENDED\n")
    said = cloud("watch", "--poll", "0", "--delete-when-done")
    assert said.code == 0, said.err
    assert cloud.has(f"{RUN_DIR}/summary.json") and not cloud.has("request")
    log = (cloud.world / "gs/my-bucket/ddk/ddk-1/logs/ddk-1-w-0.txt").read_text()
    assert "continuing from 1" in log and "continuing from 0" not in log


# --- supervise.py ---


class Supervised(NamedTuple):
    """What became of a command under the supervisor."""

    code: int
    attempts: int
    log: str
    state: dict[str, str]


def supervise(folder: Path, script: str, *options: str) -> Supervised:
    process = start_supervisor(folder, script, *options)
    return after(folder, process.wait(timeout=20))


def start_supervisor(folder: Path, script: str, *options: str) -> subprocess.Popen[bytes]:
    """`script` is for sh; $run is the run directory, $n the number of the attempt."""
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    count = f"echo x >>{folder}/attempts; n=$(wc -l <{folder}/attempts); run={run}; {script}"
    command = [sys.executable, str(SETUP / "supervise.py"), "--run-dir", str(run)]
    command += ["--log", str(folder / "log"), "--state", str(folder / "state")]
    return subprocess.Popen([*command, "--backoff", "0.01", *options, "--", "sh", "-c", count])


def after(folder: Path, code: int) -> Supervised:
    state = dict(line.split("=", 1) for line in (folder / "state").read_text().splitlines())
    attempts = len((folder / "attempts").read_text().splitlines())
    return Supervised(code, attempts, (folder / "log").read_text(), state)


@pytest.mark.parametrize("code", [3, 64, 65, 70, 75, 130])
def test_what_would_end_the_same_way_is_not_started_again(tmp_path, code):
    done = supervise(tmp_path, f"exit {code}")
    assert (done.code, done.attempts) == (code, 1)
    assert done.state["state"] == "failed" and done.state["code"] == str(code)


@pytest.mark.parametrize("script", ["exit 1", "exit 74", "exit 134", "kill -9 $$", "kill -15 $$"])
def test_a_crash_is_started_again_three_times(tmp_path, script):
    done = supervise(tmp_path, script)
    codes = {"kill -9 $$": 137, "kill -15 $$": 143}
    assert done.code == codes.get(script) or script == f"exit {done.code}"
    assert done.attempts == 4 and "giving up" in done.log
    assert done.state["state"] == "failed"


def test_progress_starts_the_count_again(tmp_path):
    # Checkpoints at the third and the sixth attempt: 3 + 3 of them, and then three more restarts.
    done = supervise(tmp_path, '[ $n = 3 -o $n = 6 ] && mkdir "$run/checkpoints/$n"; exit 1')
    assert done.attempts == 9 and done.state["step"] == "6"


def test_an_older_or_half_written_checkpoint_is_no_progress(tmp_path):
    new = 'mkdir -p "$run/checkpoints/$n" "$run/checkpoints/99$n.corrupt"'
    done = supervise(tmp_path, f"[ $n = 2 ] && mkdir $run/checkpoints/9; {new}; exit 1")
    assert done.attempts == 5 and done.state["step"] == "9"


def test_a_run_that_recovers_is_finished(tmp_path):
    done = supervise(tmp_path, "[ $n = 3 ] && touch $run/summary.json && exit 0; exit 134")
    assert (done.code, done.attempts, done.state["state"]) == (0, 3, "finished")


def test_an_end_without_a_summary_is_a_stop(tmp_path):
    done = supervise(tmp_path, "exit 0")
    assert (done.code, done.attempts, done.state["state"]) == (0, 1, "stopped")


def test_the_pause_doubles_up_to_a_limit_and_progress_resets_it(tmp_path):
    script = '[ $n = 3 ] && mkdir "$run/checkpoints/$n"; exit 1'
    done = supervise(tmp_path, script, "--max-backoff", "0.03")
    pauses = re.findall(r"starting again in ([\d.]+) seconds", done.log)
    assert pauses == ["0.01", "0.02", "0.01", "0.02", "0.03"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_command_saves(tmp_path, number):
    script = "trap 'touch $run/saved; exit 0' TERM INT; touch $run/up; while :; do sleep 0.02; done"
    process = start_supervisor(tmp_path, script)
    wait_for((tmp_path / "run" / "up").exists)
    process.send_signal(number)
    done = after(tmp_path, process.wait(timeout=20))
    assert (done.code, done.attempts, done.state["state"]) == (0, 1, "stopped")
    assert (tmp_path / "run" / "saved").exists()


def test_a_command_that_is_stopped_and_fails_is_not_started_again(tmp_path):
    script = "trap 'exit 134' TERM; touch $run/up; while :; do sleep 0.02; done"
    process = start_supervisor(tmp_path, script)
    wait_for((tmp_path / "run" / "up").exists)
    process.terminate()
    done = after(tmp_path, process.wait(timeout=20))
    assert (done.code, done.attempts, done.state["state"]) == (134, 1, "stopped")


def test_a_stop_during_the_pause_ends_it(tmp_path):
    process = start_supervisor(tmp_path, "exit 1", "--backoff", "100")
    wait_for(
        lambda: (
            "waiting" in (tmp_path / "state").read_text()
            if (tmp_path / "state").exists()
            else False
        )
    )
    process.terminate()
    assert after(tmp_path, process.wait(timeout=20)).attempts == 1


def test_a_command_that_ignores_the_signal_is_killed_after_the_grace(tmp_path):
    script = "trap '' TERM; touch $run/up; while :; do sleep 0.02; done"
    process = start_supervisor(tmp_path, script, "--grace", "0.2")
    wait_for((tmp_path / "run" / "up").exists)
    process.terminate()
    done = after(tmp_path, process.wait(timeout=20))
    assert done.code == 137 and "killing it" in done.log


def test_workers_that_outlive_the_command_are_ended(tmp_path):
    supervise(tmp_path, "sleep 60 & echo $! >$run/worker; exit 70")
    wait_for(lambda: ended(int((tmp_path / "run" / "worker").read_text())))


def test_a_command_that_is_not_there_is_one_line(tmp_path):
    command = [sys.executable, str(SETUP / "supervise.py"), "--", str(tmp_path / "ddk")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 127 and "cannot start" in done.stderr
    assert "Traceback" not in done.stderr


def test_output_goes_to_the_terminal_without_a_log(tmp_path):
    command: Sequence[str] = [sys.executable, str(SETUP / "supervise.py"), "--", "echo", "hello"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "hello\n" and "finished" in done.stderr
