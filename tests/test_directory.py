"""Directories and buckets that hold no model, a damaged one, or one that is not safe to read."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import buckets
import jax
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from small_model import SPEC, assert_equal_trees, edit_json, edit_tensors, randomised

from ddk_jax.errors import StorageError, UserError
from ddk_jax.models import families, hf
from ddk_jax.models.directory import open_tensors
from ddk_jax.models.load import load_params

# --- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["GPT3LMHeadModel"]}, "GPT3LMHeadModel.*supported"),
        ({"hidden_size": None}, "hidden_size"),
        ({"quantization_config": {"quant_method": "gptq"}}, "the weights are quantised .gptq."),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised .bitsandbytes."),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"quantization_config": "fp8"}, "quantised .fp8."),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}, "has auto_map.*modeling.Evil"),
        ({"auto_map": {"AutoConfig": "configuration.Evil"}}, "has auto_map.*configuration.Evil"),
        ({"auto_map": "modeling.Evil"}, "has auto_map"),
        (
            {
                "architectures": ["EvilForCausalLM"],
                "auto_map": {"AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"},
            },
            "EvilForCausalLM.*the code that auto_map names is never run",
        ),
    ],
)
def test_configs_that_are_not_supported_are_refused(
    copied: Path, changes: dict[str, Any], said: str
) -> None:
    edit_json(copied / "config.json", **changes)
    with pytest.raises(UserError, match=said) as caught:
        hf.load(copied)
    assert str(copied / "config.json") in str(caught.value)


def test_code_that_transformers_has_too_is_not_needed(copied: Path) -> None:
    # Some models of a known architecture still bring the code that it came from.
    code = {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM", "AutoConfig": "x.Y"}
    edit_json(copied / "config.json", auto_map=code)
    (copied / "modeling_llama.py").write_text("raise SystemExit('this was run')")
    assert_equal_trees(hf.load(copied), randomised(SPEC))


# --- tensors that do not match the config ---------------------------------------------------------


def test_missing_unexpected_misshapen_and_integer_tensors_are_all_listed(single: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
        tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((32, 48), np.float32)
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((48, 32), np.int8)

    edit_tensors(single / "model.safetensors", change)
    with pytest.raises(UserError) as caught:
        hf.load(single)
    for said in (
        "missing: model.norm.weight",
        "unexpected: model.layers.0.self_attn.q_proj.bias",
        "wrong shapes: model.layers.1.mlp.up_proj.weight [32, 48] for [48, 32]",
        "not F64, F32, F16 or BF16 (quantised?): model.layers.2.mlp.up_proj.weight I8",
    ):
        assert said in str(caught.value)


def test_a_long_list_is_cut(single: Path) -> None:
    edit_tensors(single / "model.safetensors", lambda tensors: tensors.clear())
    with pytest.raises(UserError, match=r"missing: .* and 21 more"):
        hf.load(single)


def test_padded_vocabulary_is_noticed(single: Path) -> None:
    edit_json(single / "config.json", vocab_size=60)
    with pytest.raises(UserError, match=r"embed_tokens.weight \[64, 32\] for \[60, 32\]"):
        hf.load(single)


def test_tied_flag_against_a_head(single: Path) -> None:
    expected = hf.load(single)
    file = single / "model.safetensors"
    # A head equal to the table, and buffers that old versions saved, make no difference.
    edit_tensors(
        file, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()})
    )
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    edit_tensors(file, lambda t: t.update(buffer))
    assert_equal_trees(hf.load(single), expected)

    edit_tensors(file, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] * 2}))
    with pytest.raises(
        UserError, match=r"lm_head.weight differs from .*tie_word_embeddings is true"
    ):
        hf.load(single)
    edit_tensors(file, lambda t: t.update({"lm_head.weight": np.array(1, np.float32)}))
    with pytest.raises(UserError, match=r"lm_head\.weight differs from"):
        hf.load(single)
    edit_tensors(file, lambda t: t.pop("lm_head.weight"))
    edit_json(single / "config.json", tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"missing: lm_head\.weight"):
        hf.load(single)


# --- files that are broken or not safe ------------------------------------------------------------


def test_truncated_and_corrupt_files_are_refused(single: Path) -> None:
    file = single / "model.safetensors"
    content = file.read_bytes()
    for broken in (
        b"",
        content[:4],
        content[:100],
        content[:-1],
        content + b"x",
        b"\xff" * 8 + content[8:],
        b"PK\x03\x04" + content[4:],
    ):
        file.write_bytes(broken)
        with pytest.raises(StorageError, match=r"model.safetensors: truncated or corrupt"):
            hf.load(single)


@settings(max_examples=20)
@given(content=st.binary(max_size=64))
def test_any_bytes_instead_of_weights_are_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    directory = tmp_path_factory.mktemp("noise")
    (directory / "config.json").write_text(json.dumps(families.config_from_spec(SPEC)))
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises((StorageError, UserError)):
        hf.load(directory)


def test_a_flipped_bit_is_noticed_by_the_checksum(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "model")
    for name in ("model-00001-of-*.safetensors", "config.json", "*.index.json"):
        file = next((tmp_path / "model").glob(name))
        intact = file.read_bytes()
        # In the last value of the weights, in white space of the JSON files.
        file.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1 if file.suffix != ".json" else 32]))
        with pytest.raises(StorageError, match=r"differs from its checksum in SHA256SUMS"):
            hf.load(tmp_path / "model")
        file.write_bytes(intact)
    (tmp_path / "model" / "README.md").write_text("edited by hand")
    hf.load(tmp_path / "model")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/secret.safetensors",
        "C:\\secret.safetensors",
        "C:secret.safetensors",
        "..",
        "",
        "model.bin",
        "nul\0.safetensors",
    ],
)
def test_an_index_that_leads_out_of_the_directory_is_refused(copied: Path, name: str) -> None:
    first = next(copied.glob("model-00001*"))
    shutil.copy(first, copied.parent / "secret.safetensors")
    index = copied / "model.safetensors.index.json"
    names = dict.fromkeys(json.loads(index.read_text())["weight_map"], name)
    edit_json(index, weight_map=names)
    with pytest.raises(StorageError, match="not a safetensors file in this directory"):
        hf.load(copied)


def in_the_hub_cache(directory: Path, cache: Path, blobs: str = "blobs") -> Path:
    """The files of a directory as the hub's cache keeps them: a snapshot of links to blobs."""
    snapshot = cache / "models--a--b" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / blobs).mkdir()
    for file in directory.iterdir():
        name = hashlib.sha256(file.name.encode()).hexdigest()
        shutil.copy(file, snapshot.parent.parent / blobs / name)
        (snapshot / file.name).symlink_to(Path("..", "..", blobs, name))
    return snapshot


def test_links_are_followed_to_the_blobs_of_the_hub_cache_only(copied: Path) -> None:
    assert_equal_trees(hf.load(in_the_hub_cache(copied, copied.parent / "x")), randomised(SPEC))
    for elsewhere in ("refs", "models--c--d"):
        snapshot = in_the_hub_cache(copied, copied.parent / elsewhere, elsewhere)
        with pytest.raises(StorageError, match="is a link that leads out of the directory"):
            hf.load(snapshot)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "model-00001-of-00006.safetensors"]
)
def test_no_link_that_is_read_leads_out_of_the_directory(copied: Path, name: str) -> None:
    (copied / name).rename(copied.parent / name)
    (copied / name).symlink_to(copied.parent / name)
    with pytest.raises(StorageError, match=f"{name}: is a link that leads out"):
        hf.load(copied)
    (copied / name).unlink()
    shutil.copy(copied.parent / name, copied / f"real-{name}")
    (copied / name).symlink_to(f"real-{name}")  # beside it
    assert_equal_trees(hf.load(copied), randomised(SPEC))


def test_a_tensor_that_is_there_twice_is_refused(copied: Path) -> None:
    one, other, *_ = sorted(copied.glob("*.safetensors"))
    twice = sorted(load_file(one))[0]
    edit_tensors(other, lambda tensors: tensors.update({twice: load_file(one)[twice]}))
    with pytest.raises(StorageError, match=f"00002-of-.* has what another file has too: {twice}"):
        hf.load(copied)


def test_broken_indices_are_refused(copied: Path) -> None:
    index = copied / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    moved = weight_map | {"model.norm.weight": weight_map["model.layers.2.mlp.down_proj.weight"]}
    assert moved != weight_map
    for wrong, said in (
        (moved, "lacks what model.safetensors.index.json says it has: model.norm.weight"),
        ({"a": "model-00009-of-00009.safetensors"}, "named in .* but missing"),
        ({}, "weight_map is empty"),
        ({"a": 1}, "weight_map is not a map"),
        ([], "weight_map is not a map"),
    ):
        edit_json(index, weight_map=wrong)
        with pytest.raises(StorageError, match=said):
            hf.load(copied)
    for text in ("", "{", "[]", "[" * 100_000):
        index.write_text(text)
        with pytest.raises(StorageError, match=r"cannot be read as JSON|expected a JSON object"):
            hf.load(copied)


def test_pickled_weights_are_refused_and_never_run(single: Path) -> None:
    (single / "model.safetensors").unlink()
    canary = single.parent / "canary"
    (single / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % bytes(canary))
    with pytest.raises(UserError, match=r"pickle files only \(pytorch_model.bin\)"):
        hf.load(single)
    assert not canary.exists()
    (single / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="no weights"):
        hf.load(single)


def test_things_that_are_no_model_are_refused(single: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        hf.load(single / "nowhere")
    with pytest.raises(UserError, match="is a file; a model is a directory"):
        hf.load(single / "model.safetensors")
    with pytest.raises(
        UserError, match=r"https://a.b/c: neither a path nor a place in a bucket .gs://"
    ):
        hf.load("https://a.b/c")
    (single / "config.json").unlink()
    with pytest.raises(StorageError, match=r"config.json: no such file; is this a model directory"):
        hf.read_spec(single)


# --- buckets --------------------------------------------------------------------------------------


def test_a_model_in_a_bucket_is_read_like_one_on_a_disk(exported: Path, bucket: Any) -> None:
    place = buckets.upload(exported, "gs://b/models/one")
    assert hf.read_spec(place) == SPEC
    bucket.reads.clear()
    assert_equal_trees(hf.load(place, spec=SPEC), randomised(SPEC))
    assert hf.file_digest(place) == hf.file_digest(exported)
    # For the checksum, the header and the numbers; the digest is the listed one.
    shards = {file.name: file.stat().st_size for file in exported.glob("*.safetensors")}
    for name, size in shards.items():
        read = sum(count for file, _, count in bucket.reads if file == name)
        assert 2 * size < read < 3 * size  # of small files, the first read for the header is all


def test_hosts_share_the_verification_of_a_bucket(
    exported: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = buckets.upload(exported, "gs://b/model")
    files = [path.name for path in exported.iterdir() if "model" in path.name]
    verified: list[str] = []
    monkeypatch.setattr(hf, "verify", lambda where, names, *_: verified.extend(names))
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    for host in range(3):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        hf.load(place, spec=SPEC)
    assert sorted(verified) == sorted(files)
    verified.clear()
    hf.load(exported, spec=SPEC)
    assert sorted(verified) == sorted(files)  # of its own disk, each host verifies all


def test_damage_in_a_bucket_is_noticed(copied: Path, exported: Path, bucket: Any) -> None:
    shard = sorted(exported.glob("*.safetensors"))[1]
    for directory, said in ((exported, "differs from its checksum"), (copied, "truncated")):
        place = buckets.upload(directory, "gs://b/model")
        bucket().pipe_file(f"{place}/{shard.name}", shard.read_bytes()[:-1])
        with pytest.raises(StorageError, match=f"gs://b/model/{shard.name}: .*{said}"):
            hf.load(place)
        bucket().rm(place, recursive=True)
    with pytest.raises(UserError, match="gs://b/nowhere: no such directory"):
        hf.load("gs://b/nowhere")


def test_errors_of_a_bucket_name_the_place(exported: Path, bucket: Any) -> None:
    place = buckets.upload(exported, "gs://b/model")
    bucket.broken.add("config.json")
    with pytest.raises(StorageError, match=r"gs://b/model/config.json: .*RuntimeError: 503"):
        hf.read_spec(place)
    bucket.broken.clear()
    shard = sorted(path.name for path in exported.glob("*.safetensors"))[0]
    with ExitStack() as stack:
        tensors = open_tensors(epath.Path(place), stack)
        bucket.broken.add(shard)
        with pytest.raises(StorageError, match=rf"{place}: model.* cannot be read .*{shard}.* 503"):
            load_params(tensors, SPEC, origin=place)


def test_the_package_that_a_bucket_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, **settings: Any) -> None:
        raise ImportError(f"install {name}fs")

    monkeypatch.setattr("fsspec.filesystem", missing)
    with pytest.raises(UserError, match=r"s3://b/model: .*not installed .install s3fs.*gcsfs"):
        hf.read_spec("s3://b/model")
