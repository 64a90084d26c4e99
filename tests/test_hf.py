from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ddk_jax.errors import StorageError, UserError
from ddk_jax.models import families, hf
from ddk_jax.models.decoder import Decoder, Params
from ddk_jax.models.directory import open_tensors
from ddk_jax.models.spec import ModelSpec
from ddk_jax.parallel import mesh

SPEC = ModelSpec(
    vocab_size=64,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_size=48,
    rope_theta=300.0,
    norm_eps=1e-6,
    tied_head=False,
    max_positions=96,
)
TIED = dataclasses.replace(SPEC, tied_head=True)
TEXT = "the small model reads what the large model wrote"


def randomised(spec: ModelSpec, dtype: Any = jnp.float32) -> Params:
    rng = np.random.default_rng(0)

    def leaf(shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.normal(0, 0.25, shape.shape), dtype)

    return jax.tree.map(leaf, Decoder(spec=spec).abstract())


def assert_equal_trees(ours: Params, theirs: Params) -> None:
    """Bitwise, types included."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(
            np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8)
        )


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of less than 64 tokens, and nothing beside it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=50, special_tokens=["<|start|>", "<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """An untied model in shards. Not to be changed: `copied` is."""
    directory = tmp_path_factory.mktemp("model") / "sharded"
    hf.export(
        randomised(SPEC), SPEC, directory,
        tokenizer_dir=tokenizer_dir, max_shard_bytes=30_000, card="# A card\n",
    )  # fmt: skip
    return directory


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """A copy without checksums, which would notice every change first."""
    shutil.copytree(exported, tmp_path / "model")
    (tmp_path / "model" / "SHA256SUMS").unlink()
    return tmp_path / "model"


@pytest.fixture
def single(tmp_path: Path, tokenizer_dir: Path) -> Path:
    """A tied model in one file, without checksums."""
    hf.export(randomised(TIED), TIED, tmp_path / "one", tokenizer_dir=tokenizer_dir, card="")
    (tmp_path / "one" / "SHA256SUMS").unlink()
    return tmp_path / "one"


def edit_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "drop"}))


def edit_tensors(file: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


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
    assert index["metadata"]["total_size"] == total == 4 * SPEC.num_parameters


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


@given(data=st.data())
def test_any_part_of_a_parameter_reads_as_the_slice_of_the_whole(
    exported: Path, data: st.DataObject
) -> None:
    whole = jax.tree.map(np.asarray, randomised(SPEC))
    flat = dict(jax.tree_util.tree_flatten_with_path(whole)[0])
    path = data.draw(st.sampled_from(sorted(flat, key=str)))
    index = []
    for size in flat[path].shape:
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size))))
    names = tuple(key.key for key in path)
    places = [place for place in families.placements(SPEC) if place.path == names]
    with ExitStack() as stack:
        tensors = open_tensors(exported, stack)
        read = hf._LeafReader(places, tensors, flat[path].shape, np.dtype(np.float32))
        np.testing.assert_array_equal(read(tuple(index)), flat[path][tuple(index)])


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
    ours = np.asarray(hidden @ decoder.head(params))
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()

    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    reference = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    assert tokenizer(TEXT)["input_ids"] == reference.encode(TEXT).ids
    assert tokenizer.eos_token_id == 1


@pytest.mark.torch
def test_configs_that_transformers_writes_are_read_as_it_reads_them(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import torch_llama

    for variant in torch_llama.VARIANTS.values():
        config = torch_llama.transformers.LlamaConfig(**torch_llama.SHAPE | variant)
        written = json.loads(config.to_json_string(use_diff=False))
        spec = families.spec_from_config(written | {"architectures": ["LlamaForCausalLM"]})
        assert spec.rope_theta == config.rope_parameters["rope_theta"]
        assert spec.head_dim == config.head_dim
        assert spec.norm_eps == config.rms_norm_eps
        assert spec.tied_head == config.tie_word_embeddings
        # What is absent in a minimal file has transformers' default.
        required = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "model_type",
        )  # fmt: skip
        minimal = {key: written[key] for key in required}
        theirs = torch_llama.transformers.LlamaConfig(**minimal)
        assert families.spec_from_config(minimal) == families.spec_from_config(
            json.loads(theirs.to_json_string(use_diff=False))
        )


# --- configs --------------------------------------------------------------------------------------

CONFIG = families.config_from_spec(SPEC)


def test_config_and_spec_are_inverse() -> None:
    for spec in (SPEC, TIED, dataclasses.replace(SPEC, rope_theta=5e5, norm_eps=1e-5)):
        assert families.spec_from_config(families.config_from_spec(spec)) == spec
    derived = families.config_from_spec(dataclasses.replace(SPEC, head_dim=0))
    assert derived["head_dim"] == 8


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({"rope_theta": 7.0, "rope_parameters": None}, 7.0),
        ({"rope_parameters": {"rope_theta": 7, "rope_type": "default"}, "rope_theta": None}, 7.0),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 7.0}}, 7.0),
        ({"rope_theta": 7.0, "rope_parameters": None, "rope_scaling": {"type": "default"}}, 7.0),
        ({"rope_theta": None, "rope_parameters": None}, 10_000.0),
    ],
)
def test_rope_theta_is_found_in_new_and_old_files(changes: dict[str, Any], theta: float) -> None:
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    assert families.spec_from_config(config).rope_theta == theta


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*supported: LlamaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "mistral"}, "model_type = 'mistral'"),
        ({"model_type": None, "architectures": 3}, "model_type = None"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_scaling = .*llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling = .*linear"),
        ({"rope_parameters": {"rope_theta": 300.0, "rope_type": "yarn"}}, "rope_parameters.*yarn"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1}}}, "different ones by layer"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": [1]}, "expected an object"),
        ({"rope_theta": 7.0}, "rope_theta = 7, rope_parameters.rope_theta = 300"),
        ({"hidden_size": "32"}, "hidden_size = '32': expected a positive integer"),
        ({"hidden_size": None}, "hidden_size = None: expected a positive integer"),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True"),
        ({"num_key_value_heads": 3}, "not a multiple of num_kv_heads"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"),
    ],
)
def test_configs_that_are_not_supported_are_refused(
    copied: Path, changes: dict[str, Any], said: str
) -> None:
    edit_json(copied / "config.json", **changes)
    with pytest.raises(UserError, match=said) as caught:
        hf.load(copied)
    assert str(copied / "config.json") in str(caught.value)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)


@given(key=st.sampled_from(sorted(CONFIG)), value=_JSON)
def test_any_value_of_a_key_gives_a_spec_or_a_readable_error(key: str, value: Any) -> None:
    try:
        families.spec_from_config(CONFIG | {key: value})
    except UserError as error:
        assert key in str(error) or "num_kv_heads" in str(error) or "num_heads" in str(error)


def test_shapes_that_transformers_refuses_are_refused() -> None:
    odd = dataclasses.replace(SPEC, hidden_size=30)
    with pytest.raises(UserError, match="hidden_size = 30 is not a multiple"):
        families.config_from_spec(odd)
    with pytest.raises(UserError, match="family 'gpt' is not one of llama"):
        families.config_from_spec(dataclasses.replace(SPEC, family="gpt"))


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
        "not floating point (quantised?): model.layers.2.mlp.up_proj.weight I8",
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
    (directory / "config.json").write_text(json.dumps(CONFIG))
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


def test_links_are_followed_within_the_hub_cache_only(copied: Path) -> None:
    for file in copied.glob("*.safetensors"):
        file.rename(copied.parent / file.name)
        file.symlink_to(copied.parent / file.name)
    with pytest.raises(StorageError, match="lead out of it are not followed"):
        hf.load(copied)

    snapshot = copied.parent / "models--a--b" / "snapshots" / "0123abcd"
    blobs = copied.parent / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in copied.iterdir():
        shutil.copy(file, blobs / hashlib.sha256(file.name.encode()).hexdigest())
        target = Path("..", "..", "blobs", hashlib.sha256(file.name.encode()).hexdigest())
        (snapshot / file.name).symlink_to(target)
    assert_equal_trees(hf.load(snapshot), randomised(SPEC))


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


def test_remote_code_and_things_that_are_no_model_are_refused(single: Path) -> None:
    edit_json(single / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    with pytest.raises(UserError, match="has auto_map"):
        hf.load(single)
    with pytest.raises(UserError, match="no such directory"):
        hf.load(single / "nowhere")
    (single / "config.json").unlink()
    with pytest.raises(StorageError, match="this is not a model directory"):
        hf.read_spec(single)


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

    monkeypatch.setattr(hf, "save_file", full)
    with pytest.raises(StorageError, match=r"cannot be written .*No space left"):
        hf.export(params, TIED, out, tokenizer_dir=tokenizer_dir, card="second")
    assert (out / "README.md").read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]


def test_models_and_tokenizers_that_do_not_fit_are_refused(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    small = dataclasses.replace(TIED, vocab_size=10)
    with pytest.raises(UserError, match=r"gives ids up to .*, the model has 10 embeddings"):
        hf.export(randomised(small), small, tmp_path / "a", tokenizer_dir=tokenizer_dir, card="")
    with pytest.raises(UserError, match="do not have the shape of the model"):
        hf.export(randomised(TIED), SPEC, tmp_path / "a", tokenizer_dir=tokenizer_dir, card="")
    assert not (tmp_path / "a").exists()
