"""The config: read strictly, written back whole, and never half meant."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ddk_jax import config as config_module
from ddk_jax.config import (
    Config,
    DataConfig,
    DomainConfig,
    MeshConfig,
    SourceConfig,
    TrainConfig,
    load_config,
    save_config,
)
from ddk_jax.errors import UserError
from ddk_jax.models.spec import RopeScaling
from ddk_jax.places import resolve_path
from ddk_jax.plain import from_plain, suggest, to_plain

CONFIGS = sorted(
    path
    for path in (Path(__file__).parents[1] / "configs").rglob("*.yaml")
    if path.parent.name != "study"  # no configs of runs: tests/test_study.py
)

SPEC: dict[str, Any] = {
    "hidden_size": 8,
    "num_heads": 2,
    "num_kv_heads": 1,
    "tied_head": False,
    "rope_scaling": {
        "kind": "longrope",
        "original_positions": 64,
        "short_factor": [1, 2.0],
        "long_factor": [4, 8],
    },
}
FULL: dict[str, Any] = {
    "run": {"dir": "somewhere/else", "seed": 3},
    "data": {
        "domains": [
            {
                "name": "a",
                "sources": [
                    {
                        "path": "a.jsonl",
                        "prompt": "q",
                        "response": "r",
                        "filters": [{"field": "lang", "test": "equals", "value": "en"}],
                    }
                ],
            },
            {"name": "b", "sources": [{"path": "b", "licence": "CC0"}, {"path": "c"}]},
        ],
        "shared": [
            {
                "source": {
                    "path": "d",
                    "filters": [{"field": "n", "test": "in", "value": [1, 2]}],
                },
                "field": "set",
                "domains": {"C4": "b"},
            }
        ],
    },
    "teacher": {
        "path": "t",
        "domains": {"a": 0.5},
        "others": [{"path": "u", "weight": 2.0, "domains": {"b": 3.0}, "spec": SPEC}],
        "spec": SPEC,
    },
    "student": {
        "spec": SPEC,
        "lora": {"rank": 4},
    },
    "objective": {
        "terms": [
            {"loss": "bild", "temperature": 2.0, "roles": "response", "k": 4},
            {"loss": "forward_kl", "weight": {"start": 1.0, "end": 0.0, "last_step": 9}},
        ]
    },
    "mixture": {"controller": "elasticity", "k": 4},
    "mesh": {"fsdp": 4},
}


LAST = {"last_step": 10}


def read(tmp_path: Path, text: str) -> Config:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    return load_config(tmp_path / "x.yaml")


def leaves(kind: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all plain fields; lists of dataclasses are entered at their first item."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inner = hints[field.name]
        if isinstance(inner, types.UnionType) and types.NoneType in typing.get_args(inner):
            inner = typing.get_args(inner)[0]
        name = f"{prefix}{field.name}"
        if typing.get_origin(inner) is tuple and dataclasses.is_dataclass(
            typing.get_args(inner)[0]
        ):
            yield from leaves(typing.get_args(inner)[0], f"{name}.0.")
        elif dataclasses.is_dataclass(inner):
            yield from leaves(inner, f"{name}.")
        elif inner == dict[str, Any]:  # its keys stand beside the others
            yield f"{prefix}k"
        else:
            yield name


def test_an_empty_file_is_the_defaults(tmp_path):
    assert read(tmp_path, "") == Config()
    assert read(tmp_path, "# nothing\n") == Config()


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path):
    config = read(tmp_path, "train: {steps: 40_000}\noptim:\n  learning_rate: 3e-4\n")
    expected = Config(
        train=dataclasses.replace(Config().train, steps=40_000),
        optim=dataclasses.replace(Config().optim, learning_rate=3e-4),
    )
    assert config == expected


def test_a_config_survives_being_saved(tmp_path):
    config = from_plain(Config, FULL)
    save_config(config, tmp_path / "saved.yaml")
    again = load_config(tmp_path / "saved.yaml")
    assert again == config
    assert again.digest() == config.digest()
    save_config(again, tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_bytes() == (tmp_path / "saved.yaml").read_bytes()


@pytest.mark.slow
def test_the_digest_sees_every_field():
    """Changing any field, to any depth, changes the digest; naming a default does not."""
    config = from_plain(Config, FULL)
    assert from_plain(Config, to_plain(config)).digest() == config.digest()
    digests = {config.digest()}
    count = 0
    for key in leaves(Config):
        tree = to_plain(config)
        node, *path = tree, *key.split(".")
        for part in path[:-1]:
            node = node[int(part)] if part.isdigit() else node[part]
        old = node[path[-1]]
        node[path[-1]] = _other(key, old)
        digests.add(from_plain(Config, tree).digest())
        count += 1
    assert len(digests) == count + 1 > 60


def _other(key: str, value: Any) -> Any:
    """Another value that is allowed."""
    choices = {
        "objective.terms.0.weight": {"start": 1.0, "end": 0.5, "last_step": 9},
        "run.compute_dtype": "float32",
        "data.packing": "best_fit",
        "data.shared.0.domains": {"C4": "a"},
        "data.domains.0.sources.0.filters.0.test": "matches",
        "data.shared.0.source.filters.0.test": "not_in",
        "teacher.dtype": "float32",
        "student.remat": "full",
        "student.lora.targets": ["q"],
        "objective.terms.0.roles": "prompt",
        "mixture.prior": "natural",
        "student.spec.pattern": ["global", "global"],
        "student.spec.head_dim": 6,
        "student.spec.positions": "learned",
        "student.spec.rope_scaling.kind": "yarn",
        "student.spec.rope_scaling.short_factor": [1.0],
        "student.spec.rope_scaling.long_factor": [1.0],
        "student.spec.qk_norm": "head",
        "student.spec.activation": "relu",
        "student.spec.norm": "layer",
        "student.spec.norm_placement": "post",
        "student.spec.num_heads": 4,
        "student.spec.num_kv_heads": 2,
        "student.spec.hidden_size": 16,
    }
    key = re.sub(r"^teacher(\.others\.0)?\.spec", "student.spec", key)
    if key in choices:
        return choices[key]
    if isinstance(value, dict):
        return value | {"c": 0.25}
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 1 if value == -1 else value + 1
    return value * 0.5 + 0.01 if isinstance(value, float) else f"{value}x"


def test_a_run_may_be_in_a_bucket_and_prepared_data_may_not(tmp_path):
    assert read(tmp_path, "run: {dir: gs://b/r}").run.dir == "gs://b/r"
    with pytest.raises(UserError, match=r"run.dir = 's3://b/r': has to be a folder"):
        read(tmp_path, "run: {dir: s3://b/r}")
    with pytest.raises(UserError, match=r"data.dir = 'gs://b/r': .* gcloud storage rsync"):
        read(tmp_path, "data: {dir: gs://b/r}")


def test_an_optional_section_is_absent_null_or_given(tmp_path):
    def scaling(text: str) -> Any:
        return read(tmp_path, f"student: {{spec: {{{text}}}}}").student.spec.rope_scaling

    assert scaling("num_layers: 2") is scaling("rope_scaling: null") is None
    given = scaling("rope_scaling: {kind: yarn, factor: 4, original_positions: 64}")
    assert given == RopeScaling(kind="yarn", factor=4.0, original_positions=64)
    for text, message in {
        "{factor: 2.0}": "student.spec.rope_scaling: missing key kind",
        "{kind: yarm}": "student.spec.rope_scaling.kind = 'yarm': did you mean yarn?",
        "{kind: yarn, fator: 2}": "unknown key student.spec.rope_scaling.fator",
        "yarn": "student.spec.rope_scaling: needs keys and values, got 'yarn'",
    }.items():
        with pytest.raises(UserError) as caught:
            scaling(f"rope_scaling: {text}")
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {stepz: 3}", ["train.stepz", "did you mean steps?"]),
        ("trian: {steps: 3}", ["trian", "did you mean train?"]),
        ("qqqqqq: 1", ["qqqqqq", "choose one of run, data"]),
        ("student: {spec: {hidden: 3}}", ["student.spec.hidden", "did you mean hidden_size?"]),
        ("train: {steps: many}", ["train.steps: needs int, got 'many'"]),
        ("train: {steps: 2.5}", ["train.steps: needs int"]),
        ("train: {steps: true}", ["train.steps: needs int, got True"]),
        ("train: {steps: null}", ["train.steps: needs int, got None"]),
        ("optim: {learning_rate: true}", ["optim.learning_rate: needs float"]),
        ("optim: {learning_rate: fast}", ["optim.learning_rate: needs float, got 'fast'"]),
        ("run: {dir: 7}", ["run.dir: needs str, got 7"]),
        ("run: {compute_dtype: float16}", ["run.compute_dtype = 'float16'", "did you mean"]),
        ("mixture: {prior: [uniform]}", ["mixture.prior: needs str, got ['uniform']"]),
        ("run: 3", ["run: needs keys and values, got 3"]),
        ("[1, 2]", ["the file: needs keys and values"]),
        ("data: {domains: {name: a}}", ["data.domains: needs a list"]),
        ("data: {domains: [{sources: []}]}", ["data.domains[0]: missing key name"]),
        ("data: {domains: [{name: a, sources: [a.txt]}]}", ["data.domains[0].sources[0]"]),
        ("student: {spec: {num_heads: 3, num_kv_heads: 2}}", ["student.spec", "multiple"]),
        ("train: {steps: 5}\ntrain: {steps: 6}", ["train appears twice"]),
        ("train: {steps: 5, steps: 6}", ["steps appears twice"]),
        ("1: 2", ["unknown key 1"]),
        ("{a: 1}: 2", ["not valid YAML"]),
        ("train: [", ["not valid YAML"]),
        ("!!python/object/apply:os.getcwd []", ["not valid YAML"]),
        ("train: {steps: 5}\n---\ntrain: {steps: 6}", ["not valid YAML"]),
    ],
)
def test_a_mistake_is_one_line_with_file_and_key(tmp_path, text, words):
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'x.yaml'}: ") and "\n" not in message
    assert all(word in message for word in words), message
    assert caught.value.exit_code == 64


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot be read"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "x.yaml").write_bytes(b"run: {dir: \xff\xfe}")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "x.yaml")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(st.sampled_from([*sorted(leaves(Config)), "run", "data.domains"]), json_values)
def test_any_value_is_taken_or_refused_with_its_key(key, value):
    tree = to_plain(from_plain(Config, FULL))
    node, *path = tree, *key.split(".")
    for part in path[:-1]:
        node = node[int(part)] if part.isdigit() else node[part]
    node[path[-1]] = value
    try:
        config = from_plain(Config, tree)
    except UserError as error:
        assert path[-1] in str(error) or path[0] in str(error)
    else:
        assert from_plain(Config, to_plain(config)).digest() == config.digest()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"data": {"seq_len": 0}}, "data.seq_len = 0: needs at least 1"),
        ({"data": {"validation_fraction": 1.0}}, "data.validation_fraction = 1.0"),
        ({"data": {"domains": [{"name": "a", "sources": []}] * 2}}, "name appears twice"),
        ({"run": {"log_every_steps": 0}}, "run.log_every_steps = 0"),
        ({"run": {"seed": -1}}, "run.seed = -1"),
        ({"train": {"steps": 0}, "optim": {"warmup_steps": 0}}, "train.steps = 0"),
        ({"train": {"rows_per_step": 0}}, "train.rows_per_step = 0"),
        ({"train": {"rows_per_step": 8, "micro_rows": 3}}, "micro_rows = 3 must divide"),
        ({"train": {"micro_rows": -1}}, "train.micro_rows = -1"),
        ({"train": {"steps": 10}}, "optim.warmup_steps = 1000 is longer than the run"),
        ({"mixture": {"prior_power": -1.0}}, "mixture.prior_power = -1.0"),
        ({"mixture": {"prior_power": float("nan")}}, "mixture.prior_power = nan"),
        ({"mixture": {"interval_steps": 0}}, "mixture.interval_steps = 0"),
        ({"optim": {"learning_rate": 0.0}}, "optim.learning_rate = 0.0: must be positive"),
        ({"optim": {"learning_rate": float("nan")}}, "optim.learning_rate = nan"),
        ({"optim": {"beta2": 1.0}}, "optim.beta2 = 1.0"),
        ({"optim": {"eps": 0.0}}, "optim.eps = 0.0"),
        ({"optim": {"clip_norm": -1.0}}, "optim.clip_norm = -1.0"),
        ({"evaluation": {"batch_rows": 0}}, "evaluation.batch_rows = 0"),
        ({"checkpoint": {"keep": 1}}, "checkpoint.keep = 1: needs at least 2"),
        ({"objective": {"terms": []}}, "needs at least one term"),
        ({"objective": {"terms": [{"loss": "x"}, {"loss": "x"}]}}, "two terms have one name"),
        ({"objective": {"terms": [{"loss": "x", "temperature": 0}]}}, "temperature must be"),
        (
            {"objective": {"terms": [{"loss": "x", "weight": {"start": -1, "end": 0} | LAST}]}},
            "objective term x: weight reaches -1",
        ),
        (
            {"objective": {"terms": [{"loss": "x", "temperature": {"start": 1, "end": 0} | LAST}]}},
            "objective term x: temperature reaches 0",
        ),
        (
            {
                "objective": {
                    "terms": [{"loss": "x", "weight": {"start": 1, "end": 0, "last_step": 0}}]
                }
            },
            "objective term x: weight ends at step 0",
        ),
        ({"objective": {"logits_mib": 0}}, "objective.logits_mib: must be positive"),
        ({"teacher": {"path": "t", "weight": -1.0}}, "teacher t: weight = -1.0: not a weight"),
        ({"teacher": {"path": "t", "domains": {"a": -1.0}}}, "teacher t: a = -1.0: not a weight"),
        ({"teacher": {"others": [{"path": "t"}]}}, "name the first teacher in teacher.path"),
        ({"mesh": {"fsdp": 0}}, "mesh.fsdp = 0"),
    ],
)
def test_what_cannot_work_together_is_refused(tree, message):
    with pytest.raises(UserError, match=r".") as caught:
        from_plain(Config, tree)
    assert message in str(caught.value)


def test_all_problems_are_said_at_once():
    with pytest.raises(UserError) as caught:
        Config(train=TrainConfig(steps=0), mesh=MeshConfig(tensor=0))
    assert "train.steps" in str(caught.value) and "mesh.tensor" in str(caught.value)


@pytest.mark.parametrize("key", sorted(config_module._LEAST))
def test_the_least_value_is_allowed_and_no_smaller_one(key):
    section, name = key.split(".")
    least = config_module._LEAST[key]
    relax = {"optim": {"warmup_steps": 0, "final_learning_rate": 0.0}}

    def build(value: float) -> Config:
        tree = {section: {**relax.get(section, {}), name: value}}
        return from_plain(Config, relax | tree)

    build(least)
    with pytest.raises(UserError, match=key):
        build(least - 1)


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.steps = 3  # pyrefly: ignore


def test_assets_are_found_and_not_left(tmp_path):
    assert (resolve_path("assets:tokenizer") / "tokenizer.json").is_file()
    assert resolve_path(str(tmp_path)) == tmp_path
    assert resolve_path("~/x") == Path.home() / "x"
    for path in ("assets:../config.py", "assets:/etc/passwd", "assets:corpus/../../errors.py"):
        with pytest.raises(UserError, match="leaves"):
            resolve_path(path)


def test_suggestions():
    assert suggest("forward_lk", ["cross_entropy", "forward_kl"]) == "did you mean forward_kl?"
    assert suggest("zzz", ["a", "b"]) == "choose one of a, b"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_change_only_what_they_say(path):
    """What a YAML says, the config has; what it does not say is the default."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    resolved, defaults = to_plain(load_config(path)), to_plain(Config())
    for section, values in resolved.items():
        for name, value in values.items():
            if name not in tree.get(section, {}):
                assert value == defaults[section][name]


def test_a_source_and_a_domain_need_a_name():
    with pytest.raises(TypeError):
        SourceConfig()  # pyrefly: ignore
    domain = DomainConfig(name="a", sources=(SourceConfig(path="x"),))
    assert Config(data=DataConfig(domains=(domain,))).data.domains == (domain,)
