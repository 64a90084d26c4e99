"""`ddk doctor`: whether a machine and a config are fit for a run, before it is started."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ddk_jax import __version__
from ddk_jax.config import Config, RunConfig
from ddk_jax.data.shards import TOKENIZER
from ddk_jax.data.tokenize import Tokenizer, same_tokens
from ddk_jax.errors import UserError
from ddk_jax.inspection import size_text
from ddk_jax.losses.objective import needs_teacher, term_factors
from ddk_jax.models.decoder import num_parameters
from ddk_jax.models.hub import resolve
from ddk_jax.places import bucket_errors, resolve_path, resolve_place
from ddk_jax.training.build import Job
from ddk_jax.training.rundir import PACKAGES

_ACCELERATORS = ("accel[0-9]*", "vfio/[0-9]*", "nvidia[0-9]*")
_LITTLE_DISK = 2**30
_LITTLE_MEMORY = 2 * 2**30
# Float32: the parameters, their gradient and Adam's two moments; a checkpoint lacks the gradient.
_TRAINING_BYTES = 16
_CHECKPOINT_BYTES = 12


class Check(NamedTuple):
    """One thing that was looked at."""

    name: str
    ok: bool
    value: str
    """What was found."""
    advice: str
    """What to do about it; empty when there is nothing to do."""


def examine(config: Config) -> list[Check]:
    """Look at the machine and, if the config says more than a run directory, at the config too.

    Nothing is left behind, and no weights are read. A check never raises: what is wrong is in its
    result.
    """
    job = Job(config)
    checks: dict[str, Callable[[], Check]] = {
        "versions": _versions,
        "devices": _devices,
        "memory": _memory,
        "run directory": partial(_run_directory, config),
        "hub token": _hub_token,
    }
    if replace(config, run=RunConfig()) != Config():
        checks |= {
            "settings": partial(_settings, job),
            "data": partial(_data, job),
            "tokenizers": partial(_tokenizers, job),
            "models": partial(_models, job),
            "memory estimate": partial(_memory_estimate, job),
        }
    checks["disk"] = partial(_disk, job)
    return [_guarded(name, check) for name, check in checks.items()]


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except UserError as error:
        return Check(name, False, " ".join(str(error).split()), "see the message")
    except (OSError, RuntimeError) as error:
        return Check(name, False, " ".join(str(error).split())[:300], "see the message")


def _versions() -> Check:
    """Python and the packages, held against what this package asks for."""
    from packaging.requirements import Requirement

    found = {name: metadata.version(name) for name in PACKAGES}
    said = [f"ddk_jax {__version__}", f"Python {platform.python_version()}"]
    said += [f"{name} {version}" for name, version in found.items()]
    wrong = []
    for line in _requirements():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue  # of an extra
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement}, but {version} is installed")
    advice = f"pip install --upgrade ddk_jax (needs {'; '.join(wrong)})" if wrong else ""
    return Check("versions", not wrong, ", ".join(said), advice)


def _requirements() -> list[str]:
    try:
        return metadata.requires("ddk_jax") or []
    except metadata.PackageNotFoundError:  # run from a source tree
        return []


def _devices() -> Check:
    """What jax computes on, and whether it overlooks an accelerator."""
    try:
        devices = jax.devices()
    except RuntimeError as error:
        busy = "if another process holds the chip, `lsof /dev/accel* /dev/vfio/*` names it"
        return Check("devices", False, " ".join(str(error).split())[:300], busy)
    value = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    present = sorted(str(path) for glob in _ACCELERATORS for path in Path("/dev").glob(glob))
    overlooked = devices[0].platform == "cpu" and present and not os.environ.get("JAX_PLATFORMS")
    advice = (
        f"{present[0]} is there, but jax does not use it: pip install 'ddk_jax[tpu]' or "
        "'ddk_jax[cuda]'"
        if overlooked
        else ""
    )
    return Check("devices", not overlooked, value, advice)


def _memory() -> Check:
    host, device = _host_memory(), _device_memory()
    value = f"{size_text(host)} free on the host"
    if device:
        value += f", {size_text(device)} on each device"
    short = host < _LITTLE_MEMORY
    advice = f"less than {size_text(_LITTLE_MEMORY)} is free: end other programs" if short else ""
    return Check("memory", not short, value, advice)


def _run_directory(config: Config) -> Check:
    """Write a file where the run will, or in the nearest folder that exists, and delete it."""
    if "://" in config.run.dir:
        return _bucket(config.run.dir)
    place = _nearest(resolve_path(config.run.dir))
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"x")
            probe.flush()
    except OSError as error:
        advice = "choose another run.dir, or change the owner or the permissions"
        return Check("run directory", False, f"{place}: {error.strerror}", advice)
    return Check("run directory", True, f"{config.run.dir}: can be written", "")


def _bucket(run_dir: str) -> Check:
    probe = resolve_place(run_dir) / f"doctor.{uuid.uuid4().hex}"
    try:
        with bucket_errors(probe):
            probe.write_bytes(b"x")
            probe.unlink()
    except UserError as error:
        advice = "see the message; the account needs to read and write objects in the bucket"
        return Check("run directory", False, str(error), advice)
    return Check("run directory", True, f"{run_dir}: can be written", "")


def _hub_token() -> Check:
    """Whether there is a Hugging Face token. Its value is neither read from a file nor shown."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    file = Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token")
    present = bool(os.environ.get("HF_TOKEN")) or file.is_file()
    value = "present" if present else "absent (needed for gated models only)"
    return Check("hub token", True, value, "")


def _settings(job: Job) -> Check:
    """The names in the config, and whether rows and devices fit each other."""
    factors = term_factors(job.objective, jnp.int32(0))
    terms = " + ".join(f"{w:g} {t.name}" for w, t in zip(factors, job.objective, strict=True))
    shape = " x ".join(f"{name} {size}" for name, size in job.mesh.shape.items())
    controller = f"{job.controller.name} on {job.controller.gap_kind}"
    value = f"{terms}; controller {controller}; mesh {shape}; {job.micro_rows} rows at a time"
    return Check("settings", True, value, "")


def _data(job: Job) -> Check:
    rows = sum(len(rows) for rows in job.train_rows)
    value = f"{job.config.data.dir}: {len(job.domains)} domains, {rows:,} training rows"
    return Check("data", True, value, "")


def _tokenizers(job: Job) -> Check:
    """Whether teacher, student and data give the same ids to the same text."""
    config = job.config
    data = Tokenizer(resolve_path(config.data.dir) / TOKENIZER)
    same, unknown, wrong = ["data"], [], []
    for who, model in {"teacher": config.teacher, "student": config.student}.items():
        if not model.path:
            continue
        directory = resolve(model.path, model.revision).tokenizer_dir()
        if not (directory / "tokenizer.json").is_file():
            unknown.append(f"the {who} has no tokenizer.json to compare")
        elif differences := same_tokens(Tokenizer(directory), data):
            wrong.append(f"{who} and data differ: {'; '.join(differences)}")
        else:
            same.append(who)
    match = f"{' = '.join(same)}, {data.vocab_size:,} tokens"
    advice = "prepare the data with the teacher's tokenizer (data.tokenizer)" if wrong else ""
    return Check("tokenizers", not wrong, "; ".join([match, *unknown, *wrong]), advice)


def _models(job: Job) -> Check:
    """What `ddk train` refuses before it starts."""
    job.check()
    models = [("student", job.student.spec), *(("teacher", spec) for spec in job.teachers.specs)]
    said = [f"{who} of {num_parameters(spec):,} parameters" for who, spec in models]
    return Check("models", True, ", ".join(said), "")


def _memory_estimate(job: Job) -> Check:
    """Bytes on one device for what can be told in advance; activations come on top.

    Student: float32 parameters, gradient and two moments. Teacher: its parameters. One chunk of
    logits, float32: student, gradient, and teacher where the objective asks for it.
    """
    student = job.student.spec
    shards = job.mesh.shape["fsdp"] * job.mesh.shape["tensor"]
    parts = {"student and optimizer": _TRAINING_BYTES * num_parameters(student) / shards}
    if job.teachers.specs:
        itemsize = jnp.dtype(job.teachers.dtype).itemsize
        parameters = sum(num_parameters(spec) for spec in job.teachers.specs)
        parts["teacher"] = itemsize * parameters / shards
    copies = 2 + len(job.teachers.specs) * needs_teacher(job.objective)
    parts["one chunk of logits"] = copies * 4 * job.plan.tokens * student.vocab_size
    total = sum(parts.values())
    limit = _device_memory() or _host_memory() / jax.local_device_count()
    said = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())
    value = f"{size_text(total)} of {size_text(limit)} on each device ({said}), and activations"
    advice = (
        ""
        if total < limit
        else "raise mesh.fsdp, hold the teacher in bfloat16, or lower objective.logits_mib"
    )
    return Check("memory estimate", total < limit, value, advice)


def _disk(job: Job) -> Check:
    """Room for the checkpoints that are kept, and the one that is being written."""
    config = job.config
    if "://" in config.run.dir:
        return Check("disk", True, "the checkpoints are written into the bucket", "")
    free = shutil.disk_usage(_nearest(resolve_path(config.run.dir))).free
    needed = float(_LITTLE_DISK)
    try:
        size = _CHECKPOINT_BYTES * num_parameters(job.student.spec)
        needed = max(needed, size * (config.checkpoint.keep + 1))
    except UserError:
        pass  # the student is not known; another check says why
    advice = "" if free > needed else f"the run needs about {size_text(needed)}: free some space"
    return Check("disk", free > needed, f"{size_text(free)} free at {config.run.dir}", advice)


def _nearest(path: Path) -> Path:
    """The path itself if it exists, else the nearest folder above it that does."""
    path = path.absolute()
    return next(folder for folder in [path, *path.parents] if folder.exists())


def _host_memory() -> float:
    """Bytes that programs can still have."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024.0 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _device_memory() -> float:
    """Bytes of one accelerator; 0 where devices share the host's memory."""
    stats: dict[str, Any] = jax.local_devices()[0].memory_stats() or {}
    return float(stats.get("bytes_limit", 0))
