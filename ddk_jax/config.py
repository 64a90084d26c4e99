"""The configuration of a run: frozen data, read from YAML, overridden from the command line.

A YAML file names what differs from the defaults below; an unknown or ill-typed key is one readable
error with a suggestion. `digest` identifies the resolved config.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from ddk_jax.errors import UserError
from ddk_jax.models.spec import ModelSpec
from ddk_jax.places import AnyPath, bucket_errors, resolve_place
from ddk_jax.plain import from_plain, to_plain

Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives and what makes it reproducible."""

    dir: str = "runs/default"
    """Run directory: resolved config, metrics, log, checkpoints, summary. A folder, or one in a
    bucket: `gs://BUCKET/FOLDER`."""
    seed: int = 0
    """Seed of the student's initialisation and of the data order."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the activations; `auto` is bfloat16 on TPU and GPU, float32 on CPU."""
    log_every_steps: int = 10
    """Steps between two plain progress lines; metrics.jsonl has every step."""

    def __post_init__(self) -> None:
        if "://" in self.dir and not self.dir.startswith("gs://"):
            raise ValueError(
                f"run.dir = {self.dir!r}: has to be a folder on a disk, or gs://BUCKET/FOLDER"
            )


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """A test that a row has to pass to be read; those that fail are counted."""

    field: str
    """Column; dots lead into nested objects (`meta.language`), `@file` is the file's name."""
    test: Literal[
        "equals", "in", "not_in", "matches", "at_least", "at_most", "min_chars", "max_chars"
    ]
    """`matches` has `*`, `?` and `[...]` as in file names; `min_chars` counts a text's length."""
    value: Any
    """What the field is compared with: a list for `in` and `not_in`."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One origin of documents; `docs/data.md` lists the kinds."""

    path: str
    """File, folder or glob, local or `gs://`. `assets:NAME` is a file shipped in the package,
    `tfds:NAME/CONFIG` a TFDS data set, `hf:NAME` one of Hugging Face `datasets`."""
    split: str = "train"
    """Split of a TFDS or Hugging Face data set."""
    data_dir: str = ""
    """Folder with TFDS data sets. Empty: that of TFDS itself."""
    revision: str = ""
    """Commit of a Hugging Face data set on the hub; unused for a folder."""
    text: str = "text"
    """Column that holds the text of a document; unused when `prompt` or `messages` is given. Dots
    lead into nested objects. A row of JSONL without it that has `query`, `choices` and `gold` is a
    multiple-choice question (`docs/tasks.md`)."""
    prompt: str = ""
    """Column of the prompt. Together with `response` it replaces `text`."""
    response: str = ""
    """Column of the response to the prompt."""
    messages: str = ""
    """Column of a conversation: a list of `role` and `content`, written with the chat template of
    the tokenizer. It replaces `text`."""
    encoding: str = "utf-8"
    """Encoding of text files; JSON lines are UTF-8."""
    filters: tuple[FilterConfig, ...] = ()
    """Tests that every row has to pass."""
    licence: str = ""
    """Licence of the text, copied to the manifest."""


@dataclass(frozen=True, kw_only=True)
class SharedSourceConfig:
    """A source whose rows belong to several domains, by the value of a field."""

    source: SourceConfig
    """Where the rows come from."""
    field: str
    """Column that decides; dots lead into nested objects, `@file` is the file's name."""
    domains: dict[str, str]
    """Domain for each value: `{RedPajamaC4: c4}`. Values are patterns as in file names, and the
    first that fits counts. Rows with another value are left out and counted."""


@dataclass(frozen=True, kw_only=True)
class DomainConfig:
    """A named part of the corpus; the mixture has one weight for each."""

    name: str
    """Name in tables, figures and metrics; a plain file name, since shards are stored under it."""
    sources: tuple[SourceConfig, ...] = ()
    """Where the documents come from, besides `data.shared`."""
    max_documents: int = 0
    """Documents that are kept, chosen by hash: the same ones on every machine. 0: all."""
    max_tokens: int = 0
    """Tokens that are kept, likewise; the document that passes the limit is left out. 0: all."""
    max_epochs: float = 0.0
    """How often the mixture may go through the domain. 0: as often as its weight asks for."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The corpus: what `ddk prepare` reads and where it writes."""

    dir: str = "data/default"
    """Directory of the prepared token shards and their manifest."""
    tokenizer: str = ""
    """Directory with a `tokenizer.json`, or that file. Empty: the teacher's, as it must be."""
    seq_len: int = 1024
    """Tokens that a row predicts (a row holds one more)."""
    packing: Literal["sequential", "best_fit"] = "sequential"
    """How documents fill training rows: one after the other, cut where a row ends; or so that none
    is cut that fits a row, with some padding."""
    domains: tuple[DomainConfig, ...] = ()
    """The domains, in the order in which weights and metrics list them."""
    shared: tuple[SharedSourceConfig, ...] = ()
    """Sources that hold several of the domains."""
    validation_fraction: float = 0.05
    """Share of the documents (by hash of their text) that is held out for evaluation."""
    max_rejected_fraction: float = 0.01
    """`prepare` refuses when a larger share of the documents of a domain was quarantined."""

    def __post_init__(self) -> None:
        if "://" in self.dir:
            raise ValueError(
                f"data.dir = {self.dir!r}: has to be a folder on a disk, from where its files are "
                f"mapped into memory: gcloud storage rsync --recursive {self.dir} data/NAME"
            )


@dataclass(frozen=True, kw_only=True)
class OtherTeacherConfig:
    """One more teacher."""

    path: str
    """Hugging Face model directory, or hub id."""
    revision: str = ""
    """Commit or tag of a Hugging Face hub repository; unused for a directory."""
    spec: ModelSpec | None = None
    """Its shape, which its files must have too. `ddk plan` does not need them then."""
    weight: float = 1.0
    """Its weight among the teachers."""
    domains: dict[str, float] = field(default_factory=dict)
    """Its weight in the domains named here, instead of `weight`."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen model that is distilled."""

    path: str = ""
    """Hugging Face model directory, or hub id (`owner/name`). Empty: no teacher, for training on
    labels alone."""
    revision: str = ""
    """Commit or tag of a Hugging Face hub repository; unused for a directory."""
    spec: ModelSpec | None = None
    """Its shape, which its files must have too. `ddk plan` does not need them then."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Type that the weights are held in; `auto` is the compute type. `int8`: matrices of the layers
    have 8 bits and a scale for every output, all else has the compute type."""
    weight: float = 1.0
    """Weight of this teacher where there are others."""
    domains: dict[str, float] = field(default_factory=dict)
    """Its weight in the domains named here, instead of `weight`."""
    others: tuple[OtherTeacherConfig, ...] = ()
    """Further teachers with the same tokenizer. The student learns from the mixture of them all:
    the sum of their probabilities times their weights, which are normalised at every token."""
    by_confidence: bool = False
    """Divide the weight of a teacher at a token by 1 + its cross-entropy there (MT-BERT)."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685)."""

    rank: int
    """Inner width of an adapter."""
    alpha: float = 0.0
    """An adapter is multiplied by alpha / rank. 0: by 2."""
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    """Matrices of every layer that have one; those that a family lacks are passed over."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The model that is trained: from a directory, or from random initialisation."""

    path: str = ""
    """Hugging Face model directory, or hub id, to start from. Empty: random values in the shape of
    `spec`."""
    revision: str = ""
    """Commit or tag of a Hugging Face hub repository; unused for a directory."""
    spec: ModelSpec = field(default_factory=ModelSpec)
    """Shape of a randomly initialised student. With `path`, the files must have it too, and `ddk
    plan` does not need them."""
    frozen: bool = False
    """Leave the student as it is, and train the learned parameters of the objective alone."""
    lora: LoraConfig | None = None
    """Train adapters on a student from `path`, which itself stays as it is; an export has them
    merged. Absent: the whole student learns."""
    remat: Literal["none", "full", "attention", "dots"] = "none"
    """What the backward pass recomputes: nothing, every layer, all of it but the TPU's attention
    kernel, or all but that and its matrix products."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """A number that moves from one value to another over the steps of a run."""

    kind: Literal["linear", "cosine"] = "linear"
    """A straight line, or half a cosine wave: slow at both ends."""
    start: float
    """Value up to `first_step`."""
    end: float
    """Value from `last_step` on."""
    first_step: int = 0
    """Finished steps at which it begins to move."""
    last_step: int
    """Finished steps at which it arrives."""


@dataclass(frozen=True, kw_only=True)
class TermConfig:
    """One term of the objective. Other keys are settings of the loss, such as `k` of `bild`."""

    loss: str
    """Name of the loss; `docs/losses.md` lists them with their settings."""
    name: str = ""
    """Name in metrics and figures, for a loss that is there twice. Default: that of the loss."""
    weight: float | ScheduleConfig = 1.0
    """Factor of the term's mean nats per token: a number, or a schedule."""
    temperature: float | ScheduleConfig = 1.0
    """Softmax temperature of teacher and student, likewise; of losses that have one."""
    temperature_squared: bool = False
    """Multiply the term by the squared temperature (Hinton et al. 2015)."""
    roles: Literal["all", "prompt", "response"] = "all"
    """Tokens that the term is averaged over; plain text has the role `prompt`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the loss. In YAML they stand beside the other keys of the term."""

    OTHER_KEYS: ClassVar[str] = "settings"
    """The field that takes all keys which are no fields."""


def _paper_terms() -> tuple[TermConfig, ...]:
    return (
        TermConfig(loss="cross_entropy"),
        TermConfig(loss="forward_kl", weight=0.2),
    )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the step minimises: a weighted sum of terms. The default is DDK's equation 3."""

    terms: tuple[TermConfig, ...] = field(default_factory=_paper_terms)
    """The terms; their names differ."""
    round_logits: bool = False
    """Round the logits of bfloat16 models to bfloat16 in training (never in evaluation): the loss
    takes half the memory and less time; nats of a token are off by about 0.04, without bias."""
    logits_mib: float = 1200.0
    """Float32 logits of one model that exist at one time on a device, in MiB: decides how many
    tokens the heads and the losses take at once (at most 2,048: more gains nothing)."""


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """How the data mixture follows measurements. Other keys are the controller's, such as `gap`."""

    controller: str = "ddk"
    """Name of the controller; `docs/mixture.md` lists them with their settings."""
    prior: str = "uniform"
    """Weights of `static`, and what the others start from: `uniform`, `natural` (by the domains'
    training tokens), or the directory of a finished run, whose average weights are taken."""
    prior_power: float = 1.0
    """Exponent of the prior: with `natural`, values between 0 and 1 raise small domains."""
    prior_weights: dict[str, float] = field(default_factory=dict)
    """The prior by name of the domain, in any scale, instead of `prior`."""
    interval_steps: int = 1000
    """Steps between two measurements (K in the paper)."""
    warmup_intervals: int = 0
    """Intervals with the prior before the controller is heard."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the controller. In YAML they stand beside the other keys of the mixture."""

    OTHER_KEYS: ClassVar[str] = "settings"
    """The field that takes all keys which are no fields."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay. The defaults are the paper's."""

    learning_rate: float = 3e-5
    """Peak learning rate."""
    final_learning_rate: float = 3e-6
    """Learning rate at the last step."""
    warmup_steps: int = 1000
    """Steps of linear warm-up from 0."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; vectors (norms, biases) have none."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The length of the run and the size of its steps."""

    steps: int = 30_000
    """Optimiser steps; also the length of the learning-rate schedule."""
    rows_per_step: int = 64
    """Rows of one optimiser step, over all devices."""
    micro_rows: int = 0
    """Rows of one forward and backward pass; the step accumulates over them. 0: all at once."""
    max_tokens: int = 0
    """Stop after this many predicted tokens. 0: no such limit."""
    max_intervals: int = 0
    """Stop after this many mixture intervals. 0: no such limit."""
    stop_discrepancy: float = 0.0
    """Stop when student minus teacher nats, mean over the domains, falls under this. 0: never."""
    max_skipped_in_a_row: int = 5
    """A non-finite update is never applied; the run stops (exit code 70) after this many."""
    prefetch_steps: int = 2
    """Batches built ahead of the step."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The periodic measurement of both models on every domain."""

    rows_per_domain: int = 500
    """Validation rows of each domain (the paper's 500 samples). 0: all of them."""
    batch_rows: int = 16
    """Rows of one evaluation batch."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved."""

    every_steps: int = 1000
    """Steps between two checkpoints; the last step is always saved. 0: only the last one."""
    keep: int = 2
    """Checkpoints kept; at least 2, so that a corrupt one has a predecessor."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are arranged. -1 takes what the other axes leave."""

    data: int = -1
    """Replicas that share the batch. Several slices of a TPU divide them, so that only gradients
    cross from slice to slice."""
    fsdp: int = 1
    """Devices that share the batch and the parameters."""
    tensor: int = 1
    """Devices that share heads, MLP and vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        _check(self)

    def digest(self) -> str:
        """First 16 hex digits of the sha256 of the config as canonical JSON."""
        text = json.dumps(to_plain(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


_LEAST = {
    "run.seed": 0,
    "run.log_every_steps": 1,
    "data.seq_len": 1,
    "data.max_rejected_fraction": 0,
    "mixture.prior_power": 0,
    "mixture.interval_steps": 1,
    "mixture.warmup_intervals": 0,
    "optim.final_learning_rate": 0,
    "optim.warmup_steps": 0,
    "optim.weight_decay": 0,
    "optim.clip_norm": 0,
    "train.steps": 1,
    "train.rows_per_step": 1,
    "train.micro_rows": 0,
    "train.max_tokens": 0,
    "train.max_intervals": 0,
    "train.max_skipped_in_a_row": 1,
    "train.prefetch_steps": 0,
    "evaluation.rows_per_domain": 0,
    "evaluation.batch_rows": 1,
    "checkpoint.every_steps": 0,
    "checkpoint.keep": 2,
}
"""Smallest value of a field; what 0 means is said where the field is."""


def _check(config: Config) -> None:
    """Ranges of fields and relations between them; each message says which field to change."""
    problems: list[str] = []

    def need(holds: bool, message: str) -> None:
        if not holds:
            problems.append(message)

    for key, least in _LEAST.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        need(value >= least, f"{key} = {value}: needs at least {least}")
    train, optim, mixture = config.train, config.optim, config.mixture
    fraction = config.data.validation_fraction
    need(0 < fraction < 1, f"data.validation_fraction = {fraction}: needs a share in (0, 1)")
    names = [domain.name for domain in config.data.domains]
    need(len(set(names)) == len(names), f"data.domains: a name appears twice in {names}")
    need(
        train.micro_rows <= 0 or train.rows_per_step % train.micro_rows == 0,
        f"train.micro_rows = {train.micro_rows} must divide train.rows_per_step = "
        f"{train.rows_per_step}, so that every forward pass has the same shape",
    )
    power = mixture.prior_power
    need(power < math.inf, f"mixture.prior_power = {power}: must be finite")
    rate = optim.learning_rate
    need(0 < rate < math.inf, f"optim.learning_rate = {rate}: must be positive and finite")
    need(optim.eps > 0, f"optim.eps = {optim.eps}: must be positive")
    for name, beta in {"beta1": optim.beta1, "beta2": optim.beta2}.items():
        need(0 <= beta < 1, f"optim.{name} = {beta}: needs a value in [0, 1)")
    need(
        optim.warmup_steps <= train.steps,
        f"optim.warmup_steps = {optim.warmup_steps} is longer than the run (train.steps = "
        f"{train.steps})",
    )
    names = [term.name or term.loss for term in config.objective.terms]
    need(bool(names), "objective.terms: needs at least one term")
    need(
        len(set(names)) == len(names),
        f"objective.terms: two terms have one name in {names}: give them a `name` each",
    )
    need(config.objective.logits_mib > 0, "objective.logits_mib: must be positive")
    for teacher in (config.teacher, *config.teacher.others):
        for key, weight in {"weight": teacher.weight, **teacher.domains}.items():
            need(0 <= weight < math.inf, f"teacher {teacher.path}: {key} = {weight}: not a weight")
    need(
        bool(config.teacher.path) or not config.teacher.others,
        "teacher.others: name the first teacher in teacher.path",
    )
    for name, term in zip(names, config.objective.terms, strict=True):
        for key, value in {"weight": term.weight, "temperature": term.temperature}.items():
            for problem in _number_problems(value, may_vanish=key == "weight"):
                need(False, f"objective term {name}: {key} {problem}")
    for axis, size in to_plain(config.mesh).items():
        need(size == -1 or size >= 1, f"mesh.{axis} = {size}: needs -1 or a number of devices")
    if problems:
        raise UserError("; ".join(problems))


def _number_problems(value: float | ScheduleConfig, *, may_vanish: bool) -> list[str]:
    """What is wrong with a weight or a temperature; a scheduled weight may reach 0."""
    if not isinstance(value, ScheduleConfig):
        return [] if 0 < value < math.inf else ["must be positive; or leave the term out"]
    problems = []
    for end in (value.start, value.end):
        if not (0 <= end < math.inf if may_vanish else 0 < end < math.inf):
            problems.append(f"reaches {end}: must be {'at least 0' if may_vanish else 'positive'}")
    if not 0 <= value.first_step < value.last_step:
        problems.append(f"ends at step {value.last_step}, before it begins ({value.first_step})")
    return problems


def load_config(path: str | AnyPath) -> Config:
    """Read a YAML file. Raises UserError with file, key and a suggestion."""
    return read_yaml(Config, path)


def read_yaml(kind: type[Kind], path: str | AnyPath) -> Kind:
    """Read a YAML file as a frozen dataclass, strictly.

    Raises:
      UserError: the file cannot be read, or its content is not of this kind; with file, key and a
        suggestion.
    """
    path = resolve_place(path)
    try:
        with bucket_errors(path, "read"):
            text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    try:
        tree = _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    try:
        return from_plain(kind, {} if tree is None else tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


class _Loader(yaml.SafeLoader):
    """Plain data only, and no key twice: YAML would let the second section replace the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"{', '.join(twice)} appears twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def save_config(config: Config, path: Path) -> None:
    """Write the whole resolved config as YAML that `load_config` reads back."""
    path.write_text(yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True))
