"""Model directories: written, read back, and read by transformers."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import load_file
from small_model import SPEC, TEXT, TIED, assert_equal_trees, edit_json, randomised

from ddk_jax.errors import StorageError, UserError
from ddk_jax.models import hf
from ddk_jax.models.decoder import Decoder, Params, num_parameters
from ddk_jax.models.spec import ModelSpec
from ddk_jax.parallel import mesh

# --- export and import ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [1, 20_000, 2**30])
@pytest.mark.parametrize("pattern", [("global",), ("global", "global")])
def test_import_after_export_is_bitwise(
    tmp_path: Path, tokenizer_dir: Path, dtype: Any, max_shard_bytes: int, pattern: tuple[str, ...]
) -> None:
    spec = dataclasses.replace(SPEC, pattern=pattern)
    params = randomised(spec, dtype)
    hf.export(
        params, spec, tmp_path / "out",
        tokenizer_dir=tokenizer_dir, dtype=dtype, max_shard_bytes=max_shard_bytes, card="",
    )  # fmt: skip
    assert hf.read_spec(tmp_path / "out") == SPEC
    assert_equal_trees(hf.load(tmp_path / "out", spec=spec, dtype=dtype), params)


def test_export_rounds_to_the_dtype_and_import_widens(tmp_path: Path, tokenizer_dir: Path) -> None:
    params = randomised(TIED)
    hf.export(
        params, TIED, tmp_path / "out", tokenizer_dir=tokenizer_dir, dtype=jnp.bfloat16, card=""
    )
    rounded = jax.tree.map(
        lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16).astype(np.float32), params
    )
    assert_equal_trees(hf.load(tmp_path / "out"), rounded)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_shards_and_index_follow_the_format(exported: Path) -> None:
    files = sorted(exported.glob("*.safetensors"))
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert [file.name for file in files] == names and len(files) > 2
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    total = 0
    for file in files:
        tensors = load_file(file)
        assert {name for name, holder in index["weight_map"].items() if holder == file.name} == set(
            tensors
        )
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 30_000
        total += size
        with safe_open(file, framework="numpy") as handle:
            assert handle.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == total == 4 * num_parameters(SPEC)


def test_exported_files_are_complete_and_their_checksums_hold(
    exported: Path, tokenizer_dir: Path
) -> None:
    check = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=exported)
    assert check.returncode == 0
    listed = {line.split("  ")[1] for line in (exported / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in exported.iterdir()} - {"SHA256SUMS"}
    assert {"config.json", "generation_config.json", "README.md", "tokenizer.json"} < listed
    assert (exported / "README.md").read_text() == "# A card\n"
    assert (exported / "tokenizer.json").read_bytes() == (
        tokenizer_dir / "tokenizer.json"
    ).read_bytes()
    # An absent bos id would become that of transformers' defaults.
    config = json.loads((exported / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, 1)
    assert json.loads((exported / "generation_config.json").read_text()) == {"eos_token_id": 1}


def test_tokenizer_settings_are_kept_and_name_the_start_token(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    source = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, source)
    given_settings = {"bos_token": {"content": "<|start|>"}, "model_max_length": 77}
    (source / "tokenizer_config.json").write_text(json.dumps(given_settings))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    hf.export(randomised(TIED), TIED, tmp_path / "out", tokenizer_dir=source, card="")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written == given_settings | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
    }
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["bos_token_id"] == 0


def test_shardings_place_the_same_values_and_read_parts(
    exported: Path, devices: list[jax.Device]
) -> None:
    grid = mesh.make_mesh(data=1, fsdp=2, tensor=4, devices=devices)
    decoder = Decoder(spec=SPEC)
    shardings = mesh.param_shardings(grid, decoder.logical_axes(), decoder.abstract())
    assert shardings["layers"]["0"]["mlp"]["up"].spec == P(None, "fsdp", "tensor")
    loaded = hf.load(exported, dtype=jnp.bfloat16, shardings=shardings)
    assert_equal_trees(loaded, hf.load(exported, dtype=jnp.bfloat16))
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == shardings


def test_sharded_parameters_are_exported_like_whole_ones(
    exported: Path, tmp_path: Path, tokenizer_dir: Path, devices: list[jax.Device]
) -> None:
    grid = mesh.make_mesh(data=2, fsdp=2, tensor=2, devices=devices)
    decoder = Decoder(spec=SPEC)
    shardings = mesh.param_shardings(grid, decoder.logical_axes(), decoder.abstract())
    hf.export(
        jax.device_put(randomised(SPEC), shardings), SPEC, tmp_path / "out",
        tokenizer_dir=tokenizer_dir, max_shard_bytes=30_000, card="# A card\n",
    )  # fmt: skip
    sums = [(directory / "SHA256SUMS").read_text() for directory in (tmp_path / "out", exported)]
    assert sums[0] == sums[1]


def test_digest_changes_with_weights_and_config_only(exported: Path, copied: Path) -> None:
    digest = hf.file_digest(exported)
    (copied / "README.md").write_text("another card")
    assert hf.file_digest(copied) == digest and len(digest) == 64
    edit_json(copied / "config.json", rms_norm_eps=1e-3)
    changed = hf.file_digest(copied)
    assert changed != digest
    shard = sorted(copied.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00")
    assert hf.file_digest(copied) not in (digest, changed)


# --- the reference --------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("spec", [SPEC, TIED], ids=["untied", "tied"])
def test_exported_model_loads_in_transformers_with_the_same_logits(
    tmp_path: Path, tokenizer_dir: Path, spec: ModelSpec
) -> None:
    torch = pytest.importorskip("torch")
    import transformers

    params = randomised(spec)
    out = tmp_path / "out"
    hf.export(params, spec, out, tokenizer_dir=tokenizer_dir, max_shard_bytes=30_000, card="")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    assert model.config.rope_parameters["rope_theta"] == spec.rope_theta
    assert (model.config.bos_token_id, model.config.eos_token_id) == (None, 1)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 40))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    decoder = Decoder(spec=spec)
    ids = jnp.asarray(tokens, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(40)[None], ids.shape)
    hidden, _ = jax.jit(decoder.apply)(params, ids, jnp.ones_like(ids), positions)
    ours = np.asarray(hidden @ decoder.head(params).kernel)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()

    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    reference = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    assert tokenizer(TEXT)["input_ids"] == reference.encode(TEXT).ids
    assert tokenizer.eos_token_id == 1


# --- writing --------------------------------------------------------------------------------------


def test_an_export_replaces_an_earlier_one_and_nothing_else(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    out = tmp_path / "deep" / "out"

    def export(params: Params, card: str) -> None:
        hf.export(params, TIED, out, tokenizer_dir=tokenizer_dir, card=card)

    params = randomised(TIED)
    # What a killed export left behind is in nobody's way.
    (out.parent / ".out.partial").mkdir(parents=True)
    (out.parent / ".out.partial" / "model-00001-of-00002.safetensors").write_bytes(b"x")
    export(params, "first")
    export(jax.tree.map(jnp.zeros_like, params), "second")
    assert (out / "README.md").read_text() == "second"
    assert not np.asarray(hf.load(out)["norm"]["scale"]).any()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    (out / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match="not an earlier export"):
        export(params, "third")
    assert (out / "README.md").read_text() == "second"


def test_a_failed_export_leaves_the_earlier_one(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    params = randomised(TIED)
    hf.export(params, TIED, out, tokenizer_dir=tokenizer_dir, card="first")

    def full(*args: Any, **settings: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "write_weights", full)
    with pytest.raises(StorageError, match=r"cannot be written .*No space left"):
        hf.export(params, TIED, out, tokenizer_dir=tokenizer_dir, card="second")
    assert (out / "README.md").read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]


def test_an_export_holds_no_file_that_a_link_brought(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, source)
    (tmp_path / "secret").write_text("key")
    (source / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(StorageError, match=r"chat_template.jinja: is a link that leads out"):
        hf.export(randomised(TIED), TIED, tmp_path / "out", tokenizer_dir=source, card="")
    assert not (tmp_path / "out").exists()


def test_models_and_tokenizers_that_do_not_fit_are_refused(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    small = dataclasses.replace(TIED, vocab_size=10)
    with pytest.raises(UserError, match=r"gives ids up to .*, the model has 10 embeddings"):
        hf.export(randomised(small), small, tmp_path / "a", tokenizer_dir=tokenizer_dir, card="")
    with pytest.raises(UserError, match="do not have the shape of the model"):
        hf.export(randomised(TIED), SPEC, tmp_path / "a", tokenizer_dir=tokenizer_dir, card="")
    assert not (tmp_path / "a").exists()


def test_an_export_to_a_bucket_ends_with_its_checksums(
    exported: Path, tokenizer_dir: Path, bucket: Any
) -> None:
    place = "gs://b/deep/out"

    def export(max_shard_bytes: int) -> None:
        hf.export(
            randomised(SPEC), SPEC, place,
            tokenizer_dir=tokenizer_dir, max_shard_bytes=max_shard_bytes, card="# A card\n",
        )  # fmt: skip

    export(30_000)
    assert bucket.written[-1] == "SHA256SUMS" and len(bucket.written) == len(set(bucket.written))
    sums = bucket().cat_file(f"{place}/SHA256SUMS")
    assert sums == (exported / "SHA256SUMS").read_bytes()
    assert_equal_trees(hf.load(place), randomised(SPEC))

    # A second one: first of all the first one is no longer complete; what it does not replace goes.
    bucket.written.clear()
    export(2**30)
    assert bucket.written[0] == "-SHA256SUMS" and bucket.written[-1] == "SHA256SUMS"
    names = {Path(path).name for path in bucket().ls(place, detail=False)}
    assert "model.safetensors" in names and not any("-of-" in name for name in names)
    assert_equal_trees(hf.load(place), randomised(SPEC))

    bucket().rm(f"{place}/SHA256SUMS")
    with pytest.raises(UserError, match="gs://b/deep/out: exists and is not an earlier export"):
        export(30_000)


def test_an_export_that_a_bucket_refuses_is_not_complete(tokenizer_dir: Path, bucket: Any) -> None:
    bucket.broken.add("model.safetensors")
    with pytest.raises(StorageError, match=r"gs://b/out: cannot be written .*503"):
        hf.export(randomised(TIED), TIED, "gs://b/out", tokenizer_dir=tokenizer_dir, card="")
    assert "SHA256SUMS" not in bucket.written
