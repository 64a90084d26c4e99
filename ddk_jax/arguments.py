"""From the words of a command line to a command with its arguments.

The parameters of a command are its options (tyro). A command that takes a config gets it from a
YAML file and overrides of its fields: `x.yaml --train.steps 100`.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any

import tyro
import yaml
from tyro.conf import AvoidSubcommands
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from ddk_jax.config import (
    Config,
    DataConfig,
    DomainConfig,
    FilterConfig,
    LoraConfig,
    OtherTeacherConfig,
    ScheduleConfig,
    SharedSourceConfig,
    SourceConfig,
    StudentConfig,
    TeacherConfig,
    load_config,
)
from ddk_jax.errors import UserError
from ddk_jax.models.spec import ModelSpec, RopeScaling

_SOURCE = SourceConfig(
    path="PATH", filters=(FilterConfig(field="FIELD", test="equals", value="VALUE"),)
)
_SPEC = ModelSpec(rope_scaling=RopeScaling(kind="linear"))
# For --help without a file: a domain with a source, so that their fields are listed too; likewise
# a second teacher, and what may be absent.
_EXAMPLE = Config(
    data=DataConfig(
        domains=(DomainConfig(name="NAME", sources=(_SOURCE,)),),
        shared=(SharedSourceConfig(source=_SOURCE, field="FIELD", domains={"VALUE": "NAME"}),),
    ),
    teacher=TeacherConfig(
        path="PATH", spec=_SPEC, others=(OtherTeacherConfig(path="PATH", spec=_SPEC),)
    ),
    student=StudentConfig(spec=_SPEC, lora=LoraConfig(rank=8)),
)


def bound(
    command: Callable[..., None], usage: str, words: list[str], *, configured: bool
) -> Callable[[], None]:
    """The command with what the user gave it.

    Args:
      command: its parameters are the options.
      usage: how it is called, for messages.
      words: what follows that.
      configured: whether the first word is a YAML file, for the parameter `config`.

    Raises:
      UserError: a value that cannot be meant. SystemExit: after help or a usage error (tyro).
    """

    # tyro calls what it is given; but parsing and doing are better kept apart.
    @functools.wraps(command)
    def bind(*args: object, **kwargs: object) -> Callable[[], None]:
        return functools.partial(command, *args, **kwargs)

    if configured:
        usage += " [CONFIG]" if usage == "ddk doctor" else " CONFIG"
        config, words = _with_settings(*_read_config(usage, words))
        bind = functools.partial(bind, config=config)
    # A part of the config that may be absent has options where the file has it.
    parts = (AvoidSubcommands,)
    return tyro.cli(bind, args=words, prog=usage, config=parts, registry=_numbers())


def _numbers() -> ConstructorRegistry:
    """What may be a number or a schedule is a number here; schedules are for YAML."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def number_or_schedule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if ScheduleConfig not in typing.get_args(info.type):
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="FLOAT",
            instance_from_str=lambda words: float(words[0]),
            is_instance=lambda value: isinstance(value, int | float | ScheduleConfig),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _read_config(usage: str, words: list[str]) -> tuple[Config, list[str]]:
    """The YAML file, which comes first, and the words after it."""
    if words and not words[0].startswith("-"):
        return load_config(words[0]), words[1:]
    if "-h" in words or "--help" in words:
        return _EXAMPLE, words
    if usage.startswith("ddk doctor") or "--list" in words:
        return Config(), words
    raise UserError(f"{usage} [--section.field VALUE ...]: name the YAML file before any option")


def _with_settings(config: Config, words: list[str]) -> tuple[Config, list[str]]:
    """Take `--mixture.KEY VALUE` where KEY is no field: a setting of the controller."""
    fields = {field.name for field in dataclasses.fields(config.mixture)}
    settings, rest = dict(config.mixture.settings), []
    waiting = iter(words)
    for word in waiting:
        key, is_pair, value = word.removeprefix("--mixture.").partition("=")
        key = key.replace("-", "_")
        if not word.startswith("--mixture.") or key.split(".")[0] in fields:
            rest.append(word)
        elif (value := value if is_pair else next(waiting, "")) == "":
            raise UserError(f"--mixture.{key}: needs a value")
        else:
            settings[key] = _scalar(value)
    mixture = dataclasses.replace(config.mixture, settings=settings)
    return dataclasses.replace(config, mixture=mixture), rest


def _scalar(text: str) -> Any:
    """What the text would be in YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
