"""What a study is: a YAML file, and the runs that it stands for."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ddk_jax.config import Config, load_config, read_yaml
from ddk_jax.errors import UserError
from ddk_jax.places import resolve_path
from ddk_jax.plain import from_plain, suggest, to_plain

LAST = "run"
"""Name of a method's last stage, the one that is measured."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """One side of a comparison. Other keys are sections of the config, which the base's merge with.

    A string `{NAME}` in them stands for the run directory of the stage of this name, and
    `{NAME}/export` for its student.
    """

    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Runs that come first, in this order: sections for each, instead of those of the method."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Sections of the config. In YAML they stand beside the other keys."""

    OTHER_KEYS: ClassVar[str] = "changes"
    """The field that takes all keys which are no fields."""


@dataclass(frozen=True, kw_only=True)
class AxisConfig:
    """Variants of a method that differ in one number; each becomes a method `METHOD_AXIS_VALUE`."""

    method: str
    """The method that is varied."""
    key: str
    """Dotted key of its config; numbers lead into lists: `objective.terms.1.weight`."""
    values: tuple[Any, ...]
    """What the key is set to."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """One learning rate for all methods, and a check that it did not decide the comparison."""

    method: str
    """Method that chooses the rate: the one with the smallest mean gap, on the first seed."""
    rates: tuple[float, ...]
    """Candidates."""
    leaders: int = 0
    """Number of leading methods that are run again, on the first seed, at other rates."""
    factors: tuple[float, ...] = (0.5, 2.0)
    """Factors of those rates."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A study, as its YAML says it."""

    base: str
    """Config of a run, which the methods change."""
    dir: str
    """Where the runs and the results go."""
    methods: dict[str, MethodConfig]
    """What is compared, by name."""
    reference: str
    """Method that all others are compared with, seed by seed."""
    first: tuple[str, ...] = ()
    """Configs of runs that are trained and exported before all others, unless that is done."""
    common: dict[str, Any] = field(default_factory=dict)
    """Sections of the config for all methods and stages."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of every method."""
    axes: dict[str, AxisConfig] = field(default_factory=dict)
    """Variants of methods, by name of what is varied."""
    search: SearchConfig | None = None
    """How the learning rate is chosen. Absent: the configs say it."""
    rows_per_domain: int = 128
    """Validation rows that the final students are measured on; 0: all."""

    def __post_init__(self) -> None:
        if "://" in self.dir:
            raise UserError(f"dir = {self.dir!r}: a study needs a folder, which machines may share")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds = {list(self.seeds)}: needs different numbers")
        named = {"reference": self.reference}
        named |= {f"axes.{name}.method": axis.method for name, axis in self.axes.items()}
        if self.search is not None:
            named["search.method"] = self.search.method
            if not self.search.rates or min(self.search.rates) <= 0:
                raise UserError("search.rates: needs positive learning rates")
        for key, name in named.items():
            if name not in self.methods:
                raise UserError(f"{key} = {name!r}: {suggest(name, list(self.methods))}")
        names = [*self.methods, *self.axes, *(s for m in self.methods.values() for s in m.stages)]
        for name in names:
            if not _NAME.fullmatch(name) or name == LAST:
                raise UserError(f"{name!r}: not a name for a method, stage or axis")


class Stage(NamedTuple):
    """One run of a cell."""

    name: str
    config: Config


class Cell(NamedTuple):
    """One entry of the grid: a method with a seed and a learning rate."""

    method: str
    seed: int
    rate: float
    stages: tuple[Stage, ...]
    """The last one is measured; the others are exported."""
    directory: Path

    @property
    def key(self) -> tuple[str, int, float]:
        """What tells it from the other cells."""
        return self.method, self.seed, self.rate

    @property
    def config(self) -> Config:
        """Of the run that is measured."""
        return self.stages[-1].config

    @property
    def digest(self) -> str:
        """Identifies the configs of all stages."""
        configs = " ".join(stage.config.digest() for stage in self.stages)
        return hashlib.sha256(configs.encode()).hexdigest()[:16]

    @property
    def row_tokens(self) -> int:
        """Tokens in the rows of all stages: a measure of how long they take."""
        return sum(
            c.train.steps * c.train.rows_per_step * c.data.seq_len
            for c in (stage.config for stage in self.stages)
        )


@dataclass(frozen=True)
class Study:
    """A study with its base config, ready to say what its runs are."""

    name: str
    config: StudyConfig
    base: Config
    """With the sections that are common to all methods."""

    @property
    def directory(self) -> Path:
        """Where the runs and the results go."""
        return resolve_path(self.config.dir)

    @property
    def methods(self) -> list[str]:
        """All methods, with the variants that axes make of them, in the order of the file."""
        return [*self.config.methods, *self.variants]

    @cached_property
    def variants(self) -> dict[str, tuple[str, Any]]:
        """Axis and value of every variant that is not the method itself, by its name."""
        on_axes = {name for names in self.axes.values() for name in names.values()}
        return {name: v for name, v in self._all_variants.items() if name in on_axes}

    @cached_property
    def axes(self) -> dict[str, dict[str, str]]:
        """The methods on every axis by their values, as text: variants, or the method itself."""
        found: dict[str, dict[str, str]] = {}
        for name, (axis, value) in self._all_variants.items():
            own = self.config.axes[axis].method
            varied, plain = (self._read(self._trees(m)[LAST], m, LAST) for m in (name, own))
            found.setdefault(axis, {})[str(value)] = own if varied == plain else name
        return found

    @property
    def _all_variants(self) -> dict[str, tuple[str, Any]]:
        return {
            f"{axis.method}_{name}_{value}": (name, value)
            for name, axis in self.config.axes.items()
            for value in axis.values
        }

    @property
    def untouched(self) -> Path:
        """Where the measurement of the student that all methods start from is kept."""
        return self.directory / f"untouched_{self.base.digest()}_{self.config.rows_per_domain}.json"

    def cell(self, method: str, seed: int, rate: float | None = None) -> Cell:
        """The runs of a method with a seed.

        Args:
          method: one of `methods`.
          seed: of the run; also of its data order.
          rate: learning rate of all its stages; None: as its config says.

        Raises:
          UserError: the config that results is not one; the message names the method.
        """
        if (method, seed, rate) not in self._known:
            self._known[method, seed, rate] = self._made(method, seed, rate)
        return self._known[method, seed, rate]

    @cached_property
    def _known(self) -> dict[tuple[str, int, float | None], Cell]:
        return {}

    def _made(self, method: str, seed: int, rate: float | None) -> Cell:
        trees = self._trees(method, rate)
        chosen = float(trees[LAST]["optim"]["learning_rate"])
        directory = self.directory / method / f"rate_{chosen:g}" / f"seed_{seed}"
        places = {name: str(directory / name) for name in trees}
        stages = []
        for name, tree in trees.items():
            others = {n: p for n, p in places.items() if n != LAST}
            config = self._read(_filled(tree, others), method, name)
            run = replace(config.run, dir=places[name], seed=seed)
            stages.append(Stage(name, replace(config, run=run)))
        return Cell(method, seed, chosen, tuple(stages), directory)

    def _trees(self, method: str, rate: float | None = None) -> dict[str, dict[str, Any]]:
        """The configs of a method's stages, which name each other's directories as `{NAME}`."""
        axis = self._all_variants.get(method)
        described = self.config.methods[self.config.axes[axis[0]].method if axis else method]
        trees = {}
        for name, changes in {**described.stages, LAST: described.changes}.items():
            tree = _merged(to_plain(self.base), changes)
            if rate is not None:
                tree["optim"]["learning_rate"] = rate
            if axis and name == LAST:
                _put(tree, self.config.axes[axis[0]].key, axis[1])
            trees[name] = tree
        return trees

    def _read(self, tree: Mapping[str, Any], method: str, stage: str) -> Config:
        try:
            return from_plain(Config, tree)
        except UserError as error:
            raise UserError(f"{self.name}: methods.{method}: {stage}: {error}") from error

    def cells(self, rate: float | None = None) -> list[Cell]:
        """The grid, seed by seed, so that every method has one result early."""
        return [self.cell(m, seed, rate) for seed in self.config.seeds for m in self.methods]

    def search(self) -> list[Cell]:
        """The cells that choose the learning rate; none without a search."""
        search = self.config.search
        if search is None:
            return []
        return [self.cell(search.method, self.config.seeds[0], rate) for rate in search.rates]

    def checks(self, leaders: Sequence[str], rate: float) -> list[Cell]:
        """The leading methods at the other learning rates."""
        search = self.config.search
        assert search is not None
        seed = self.config.seeds[0]
        return [self.cell(m, seed, rate * f) for m in leaders for f in search.factors]


def load_study(path: Path) -> Study:
    """Read a study and its base config.

    Raises:
      UserError: one of the two cannot be read, or is not what it should be.
    """
    config = read_yaml(StudyConfig, path)
    try:
        tree = _merged(to_plain(load_config(resolve_path(config.base))), config.common)
        study = Study(path.stem, config, from_plain(Config, tree))
        study.cells()  # mistakes in any method show before the first run
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if twice := config.methods.keys() & study.variants.keys():
        raise UserError(f"{path}: an axis makes {', '.join(twice)}, which is a method already")
    return study


def _merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the tree with what the changes say; lists are replaced, and by {} anything."""
    result = copy.deepcopy(dict(tree))
    for key, value in changes.items():
        old = result.get(key)
        both = bool(value) and isinstance(value, Mapping) and isinstance(old, Mapping)
        result[key] = _merged(old, value) if both else copy.deepcopy(value)  # type: ignore[arg-type]
    return result


def _put(tree: Any, key: str, value: Any) -> None:
    """Set the value at a dotted key."""
    *path, last = (int(part) if part.isdigit() else part for part in key.split("."))
    try:
        for part in path:
            tree = tree[part]
        if isinstance(tree, list):
            _ = tree[last]  # type: ignore[index]
        tree[last] = value
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"axes: {key}: the config has no such place") from error


def _filled(value: Any, places: Mapping[str, str]) -> Any:
    """The value with directories in the place of the names of stages."""
    if isinstance(value, str):
        for name, place in places.items():
            value = value.replace("{" + name + "}", place)
        return value
    if isinstance(value, dict):
        return {key: _filled(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, places) for item in value]
    return value
