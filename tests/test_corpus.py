from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from ddk_jax.config import Config, StudentConfig, TeacherConfig
from ddk_jax.data.shards import Manifest
from ddk_jax.errors import UserError
from ddk_jax.training.corpus import prepare_corpus


def prepared(root: Path, out: Path, **models: Any) -> Manifest:
    config = tiny.config(root, out, **{"data.dir": str(out), "data.tokenizer": ""})
    return prepare_corpus(replace(config, **models), progress=lambda _: None)


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_without_a_tokenizer_of_its_own_the_data_has_that_of_the_models(
    tiny_root: Path, tmp_path: Path, who: str
) -> None:
    path = str(tiny_root / "teacher")
    models = {"teacher": TeacherConfig(), "student": StudentConfig()}
    models[who] = replace(models[who], path=path)
    named = prepare_corpus(
        tiny.config(tiny_root, tmp_path, **{"data.dir": str(tmp_path / "named")}),
        progress=lambda _: None,
    )
    assert prepared(tiny_root, tmp_path / "data", **models).inputs_digest == named.inputs_digest


def test_without_any_tokenizer_it_says_what_to_name(tiny_root: Path, tmp_path: Path) -> None:
    models = {"teacher": TeacherConfig(), "student": Config().student}
    with pytest.raises(UserError, match=r"data\.tokenizer: name a directory"):
        prepared(tiny_root, tmp_path, **models)
