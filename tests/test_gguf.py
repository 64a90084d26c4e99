"""GGUF files, written by the package `gguf` as llama.cpp's converter does, and read by ours."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import struct
import subprocess
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import decoders, models, pre_tokenizers

from ddk_jax import cli
from ddk_jax.data.tokenize import Tokenizer
from ddk_jax.errors import StorageError, UserError
from ddk_jax.losses import targets
from ddk_jax.models import hf
from ddk_jax.models.decoder import Decoder, Params, num_parameters
from ddk_jax.models.gguf import file as container
from ddk_jax.models.gguf import llama
from ddk_jax.models.gguf.convert import import_gguf
from ddk_jax.models.gguf.tokenizer import write_tokenizer
from ddk_jax.models.spec import ModelSpec, RopeScaling

END, START = "<|endoftext|>", "<|start|>"
TEXT = "the small model reads what the large model wrote, 12345 times; I'LL x = [1, 2]\n"
SPEC = ModelSpec(
    vocab_size=280,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    ffn_size=96,
    max_positions=128,
    rope_theta=300.0,
    norm_eps=1e-5,
)
QUANTISED = [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0]


# --- files to read --------------------------------------------------------------------------------


def hf_weights(spec: ModelSpec, seed: int = 0) -> dict[str, np.ndarray]:
    """A random Llama under its Hugging Face names."""
    rng = np.random.default_rng(seed)
    E, F, D = spec.hidden_size, spec.ffn_size, spec.head_width
    q, kv = spec.num_heads * D, spec.num_kv_heads * D
    shapes = {"model.embed_tokens.weight": (spec.vocab_size, E), "model.norm.weight": (E,)}
    if not spec.tied_head:
        shapes["lm_head.weight"] = (spec.vocab_size, E)
    for i in range(spec.num_layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (E,),
            f"{layer}.post_attention_layernorm.weight": (E,),
            f"{layer}.self_attn.q_proj.weight": (q, E),
            f"{layer}.self_attn.k_proj.weight": (kv, E),
            f"{layer}.self_attn.v_proj.weight": (kv, E),
            f"{layer}.self_attn.o_proj.weight": (E, q),
            f"{layer}.mlp.gate_proj.weight": (F, E),
            f"{layer}.mlp.up_proj.weight": (F, E),
            f"{layer}.mlp.down_proj.weight": (E, F),
        }
    return {
        name: ((len(shape) == 1) + rng.normal(0, 0.25, shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    for theirs, ours in GGUF_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row by row what llama.cpp's converter does to q and k."""
    width, out = len(rows) // heads, np.empty_like(rows)
    for head in range(heads):
        for i in range(width):
            pair, half = i // 2, i % 2
            out[head * width + i] = rows[head * width + half * width // 2 + pair]
    return out


def gguf_weights(weights: dict[str, np.ndarray], spec: ModelSpec) -> dict[str, np.ndarray]:
    heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}
    return {
        gguf_name(name): interleaved(value, heads[kind]) if kind in heads else value
        for name, value in weights.items()
        for kind in [name.split(".")[-2]]
    }


def byte_tokenizer(*, digits: bool = True) -> tokenizers.Tokenizer:
    """Trained, with 280 tokens, the last two of them control tokens; the classes are its own."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    cuts = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=278,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.add_special_tokens([START, END])
    assert tokenizer.get_vocab_size() == 280
    return tokenizer


def tokenizer_metadata(tokenizer: tokenizers.Tokenizer, pre: str = "smollm") -> dict[str, Any]:
    """What a file says of a byte-level tokenizer."""
    model = json.loads(tokenizer.to_str())["model"]
    size = tokenizer.get_vocab_size()
    tokens = [str(tokenizer.id_to_token(i)) for i in range(size)]
    added = tokenizer.get_added_tokens_decoder()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(
            [3 if i in added and added[i].special else 4 if i in added else 1 for i in range(size)],
            np.int32,
        ),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": size - 2,
        "tokenizer.ggml.eos_token_id": size - 1,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }


BYTES = byte_tokenizer()


def spec_metadata(spec: ModelSpec) -> dict[str, Any]:
    return {
        "general.name": "A random model",
        "general.license": "mit",
        "general.organization": "nobody",
        "llama.block_count": spec.num_layers,
        "llama.context_length": spec.max_positions,
        "llama.embedding_length": spec.hidden_size,
        "llama.feed_forward_length": spec.ffn_size,
        "llama.attention.head_count": spec.num_heads,
        "llama.attention.head_count_kv": spec.num_kv_heads,
        "llama.attention.key_length": spec.head_width,
        "llama.attention.value_length": spec.head_width,
        "llama.attention.layer_norm_rms_epsilon": spec.norm_eps,
        "llama.rope.dimension_count": spec.head_width,
        "llama.rope.freq_base": spec.rope_theta,
        "llama.vocab_size": spec.vocab_size,
    }


METADATA = spec_metadata(SPEC) | tokenizer_metadata(BYTES)


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    metadata: dict[str, Any] | None = None,
    kind: Kind = Kind.F32,
    architecture: str = "llama",
) -> Path:
    """Matrices of one type, vectors in float32; a value of None leaves the key out."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (METADATA if metadata is None else metadata).items():
        if isinstance(value, np.ndarray):
            writer.add_array(key, value.tolist())
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_string(key, value)
    for name, value in tensors.items():
        used = kind if value.ndim > 1 else Kind.F32
        stored = value if used == Kind.F32 else gguf.quantize(value, used)
        writer.add_tensor(name, stored, raw_dtype=None if used in (Kind.F32, Kind.F16) else used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model in float32. Not to be changed."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return write_gguf(path, gguf_weights(hf_weights(SPEC), SPEC))


# --- the container --------------------------------------------------------------------------------


def test_metadata_and_tensors_are_those_that_the_gguf_package_reads(small: Path) -> None:
    ours, theirs = container.read(small), gguf.GGUFReader(small)
    fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata.keys() == fields.keys()
    for key, field in fields.items():
        np.testing.assert_array_equal(np.asarray(ours.metadata[key]), np.asarray(field.contents()))
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tuple(tensor.shape[::-1]) and found.kind == tensor.tensor_type.name
        np.testing.assert_array_equal(found[()], tensor.data)


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q4_K, Kind.Q6_K, Kind.IQ4_XS, Kind.BF16])
def test_any_part_of_a_quantised_tensor_reads_as_the_slice_of_the_whole(
    tmp_path: Path, kind: Kind
) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(1)
    data = rng.integers(0, 256, (5000, 512 // block * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = container.read(tmp_path / "x.gguf").tensors["x"]
    with np.errstate(all="ignore"):
        whole = gguf.dequantize(data, kind)
    assert found.get_shape() == [5000, 512] and found.get_dtype() == "F32"
    np.testing.assert_array_equal(found[()], whole)
    np.testing.assert_array_equal(found[4090:4099, 5:300], whole[4090:4099, 5:300])
    np.testing.assert_array_equal(found[slice(2, 4)], whole[2:4])


def test_a_file_that_is_cut_anywhere_is_refused(small: Path, tmp_path: Path) -> None:
    content = small.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 64, 3), *range(64, 9000, 397), *range(9000, len(content), 39_973)]:
        cut.write_bytes(content[:length])
        with pytest.raises(StorageError) as caught:
            container.read(cut)
        assert str(cut) in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=150)
@given(data=st.data())
def test_flipped_bytes_of_the_header_are_refused_or_harmless(
    small: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(small.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 9000))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    path.write_bytes(content)
    try:
        file = container.read(path)
        spec = llama.read_spec(file)
        for tensor in llama.hf_tensors(file, spec).values():
            tensor.get_dtype()
    except UserError as error:  # which a StorageError is too
        assert str(path) in str(error)


def header(*parts: int | bytes, keys: int = 0, tensors: int = 0) -> bytes:
    """The start of a file; a number is 8 bytes."""
    numbers = [part if isinstance(part, bytes) else struct.pack("<Q", part) for part in parts]
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + b"".join(numbers)


HUGE = 2**62


@pytest.mark.parametrize(
    "content",
    [
        header(keys=HUGE),
        header(tensors=HUGE),
        header(HUGE, keys=1),
        header(1, b"k", struct.pack("<IIQ", 9, 0, HUGE), keys=1),  # bytes
        header(1, b"k", struct.pack("<IIQ", 9, 8, HUGE), keys=1),  # texts
        header(1, b"k", struct.pack("<IIQ", 9, 9, HUGE), keys=1),  # arrays
        header(1, b"k", struct.pack("<IIQ", 9, 12, HUGE), keys=1),
        header(1, b"k", struct.pack("<I", 8), HUGE, keys=1),
        header(1, b"k", struct.pack("<I", 99), keys=1),
        header(1, b"t", struct.pack("<I", 2**32 - 1), tensors=1),
        header(1, b"t", struct.pack("<I", 0), tensors=1),
        header(1, b"t", struct.pack("<IQQIQ", 2, HUGE, HUGE, 0, 0), tensors=1),
        header(1, b"t", struct.pack("<IQIQ", 1, 0, 0, 0), tensors=1),
        header(1, b"t", struct.pack("<IQIQ", 1, 1, 2, 0), tensors=1),  # part of a block
        header(1, b"t", struct.pack("<IQIQ", 1, 1, 0, HUGE), tensors=1),
        header(1, b"t", struct.pack("<IQIQ", 1, 1, 0, 1), tensors=1),  # not aligned
        header(2, b"\xff\xfe", struct.pack("<IB", 0, 1), keys=1),
        b"GGUF" + struct.pack("<I", 1),
        b"GGUF" + struct.pack(">I", 3) + bytes(16),
        b"PK\x03\x04" + bytes(100),
        b"",
    ],
)
def test_absurd_headers_cost_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "absurd.gguf"
    path.write_bytes(content + bytes(64) * (len(content) > 30))
    tracemalloc.start()
    try:
        with pytest.raises(StorageError, match=r"absurd\.gguf: "):
            container.read(path)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file"):
        container.read(tmp_path / "none.gguf")
    with pytest.raises(StorageError, match="no such file"):
        container.read(tmp_path)


def test_types_that_are_not_known_or_not_numbers_are_named(tmp_path: Path) -> None:
    unknown = header(1, b"t", struct.pack("<IQIQ", 1, 1, 777, 0), tensors=1)
    (tmp_path / "new.gguf").write_bytes(unknown + bytes(64))
    with pytest.raises(UserError, match=r"new\.gguf: tensor t has type 777, which the installed"):
        container.read(tmp_path / "new.gguf")
    tensors = gguf_weights(hf_weights(SPEC), SPEC)
    tensors["blk.1.ffn_up.weight"] = np.zeros((96, 64), np.int8)
    path = write_gguf(tmp_path / "int.gguf", tensors)
    with pytest.raises(UserError, match=r"quantised\?\): model.layers.1.mlp.up_proj.weight I8"):
        import_gguf(path, tmp_path / "out")


# --- the permutation ------------------------------------------------------------------------------


@given(heads=st.integers(1, 5), half=st.integers(1, 6), columns=st.integers(1, 3))
def test_deinterleaving_undoes_the_permutation(heads: int, half: int, columns: int) -> None:
    rows = np.arange(heads * 2 * half * columns, dtype=np.float32).reshape(-1, columns)
    np.testing.assert_array_equal(llama.deinterleave(interleaved(rows, heads), 2 * half), rows)
    np.testing.assert_array_equal(interleaved(llama.deinterleave(rows, 2 * half), heads), rows)


def test_scores_do_not_notice_the_permutation() -> None:
    """Neighbours turned in their layout give the products that halves give in ours."""
    rng = np.random.default_rng(0)
    heads, width = 2, 8
    q, k = rng.normal(size=(2, heads * width, 1)).astype(np.float32)
    frequencies = 100.0 ** -(np.arange(width // 2) / (width // 2))

    def neighbours(x: np.ndarray, position: int) -> np.ndarray:
        turned = (x[0::2] + 1j * x[1::2]) * np.exp(1j * position * frequencies)
        return np.stack([turned.real, turned.imag], -1).reshape(-1)

    def halves(x: np.ndarray, position: int) -> np.ndarray:
        turned = (x[: width // 2] + 1j * x[width // 2 :]) * np.exp(1j * position * frequencies)
        return np.concatenate([turned.real, turned.imag])

    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        ours = [llama.deinterleave(x, width)[part, 0] for x in (q, k)]
        np.testing.assert_allclose(
            halves(ours[0], 9) @ halves(ours[1], 4),
            neighbours(q[part, 0], 9) @ neighbours(k[part, 0], 4),
            rtol=1e-6,
        )


@settings(max_examples=25)
@given(data=st.data())
def test_any_rows_of_q_read_as_the_slice_of_the_whole(small: Path, data: st.DataObject) -> None:
    file = container.read(small)
    name = "model.layers.1.self_attn.q_proj.weight"
    tensor, whole = llama.hf_tensors(file, SPEC)[name], hf_weights(SPEC)[name]
    bounds = []
    for size in whole.shape:
        start = data.draw(st.integers(0, size))
        bounds.append(slice(start, data.draw(st.integers(start, size))))
    np.testing.assert_array_equal(tensor[tuple(bounds)], whole[tuple(bounds)])


# --- from metadata to a spec ----------------------------------------------------------------------


def without_tokens(**changes: Any) -> dict[str, Any]:
    given_keys = {key.replace("_0_", "."): value for key, value in changes.items()}
    return spec_metadata(SPEC) | given_keys


def spec_of(tmp_path: Path, metadata: dict[str, Any], **more: np.ndarray) -> ModelSpec:
    tensors = {name: np.zeros((1, 1), np.float32) for name in ("a", "b")}
    tensors |= {name.replace("_0_", "."): value for name, value in more.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    architecture = metadata.pop("architecture", "llama")
    path = write_gguf(tmp_path / "spec.gguf", tensors, metadata, architecture=architecture)
    return llama.read_spec(container.read(path))


def test_spec_follows_from_the_metadata(tmp_path: Path) -> None:
    assert spec_of(tmp_path, METADATA) == SPEC
    untied = spec_of(tmp_path, METADATA, **{"output.weight": np.zeros((1, 1), np.float32)})
    assert untied == dataclasses.replace(SPEC, tied_head=False)
    bare = without_tokens(
        llama_0_attention_0_key_length=None,
        llama_0_attention_0_value_length=None,
        llama_0_attention_0_head_count_kv=None,
        llama_0_rope_0_dimension_count=None,
        llama_0_rope_0_freq_base=None,
        llama_0_expert_count=0,
    )
    assert spec_of(tmp_path, bare) == dataclasses.replace(
        SPEC, num_kv_heads=4, head_dim=16, rope_theta=10_000.0
    )


LLAMA3 = RopeScaling(
    kind="llama3",
    factor=32.0,
    original_positions=8192,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)


def llama3_divisors(theta: float, width: int, scaling: RopeScaling) -> np.ndarray:
    """Frequency by frequency, as in Llama 3.1's paper code."""
    out = []
    for i in range(0, width, 2):
        wavelength = 2 * np.pi * theta ** (i / width)
        if wavelength < scaling.original_positions / scaling.high_freq_factor:
            out.append(1.0)
        elif wavelength > scaling.original_positions / scaling.low_freq_factor:
            out.append(scaling.factor)
        else:
            smooth = scaling.original_positions / wavelength - scaling.low_freq_factor
            smooth /= scaling.high_freq_factor - scaling.low_freq_factor
            out.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(out, np.float32)


def test_rope_scaling_is_recovered(tmp_path: Path) -> None:
    theta = {"llama.rope.freq_base": 500_000.0}
    divisors = llama3_divisors(500_000.0, 32, LLAMA3)
    assert 1 < len(np.unique(divisors)) < 16
    found = spec_of(tmp_path, METADATA | theta, **{"rope_freqs.weight": divisors})
    assert found.rope_scaling == LLAMA3 and found.rope_theta == 500_000.0
    ones = np.ones(16, np.float32)
    assert spec_of(tmp_path, METADATA, **{"rope_freqs.weight": ones}).rope_scaling is None
    with pytest.raises(UserError, match=r"rope_freqs\.weight is not that of Llama 3"):
        spec_of(tmp_path, METADATA | theta, **{"rope_freqs.weight": divisors + ones})
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        found = spec_of(tmp_path, METADATA | {f"llama.{key}": 4.0})
        assert found.rope_scaling == RopeScaling(kind="linear", factor=4.0)
    none = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}
    assert spec_of(tmp_path, METADATA | none).rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2' is not supported, only 'llama'"),
        ({"split.count": 3}, "one of several parts"),
        ({"llama.expert_count": 8}, r"may change what the model computes: llama.expert_count = 8"),
        ({"llama.attention.causal": False}, "llama.attention.causal = False"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale = 0.5"),
        ({"llama.new_thing": [1, 2]}, "llama.new_thing"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn' is not supported"),
        ({"llama.attention.head_count_kv": [2, 2]}, "head_count_kv = .*one positive integer"),
        ({"llama.attention.head_count_kv": 3}, "not a multiple of num_kv_heads"),
        ({"llama.attention.value_length": 16}, "value_length differs from the heads' width, 32"),
        ({"llama.rope.dimension_count": 16}, "dimension_count differs from the heads' width, 32"),
        ({"llama.block_count": 2**31 - 1}, "block_count = 2147483647: more than the file has"),
        ({"llama.block_count": 0}, "block_count = 0: expected one positive integer"),
        ({"llama.embedding_length": None}, "embedding_length = None"),
        ({"llama.embedding_length": 64.0}, "embedding_length = 64.0"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "epsilon = None: expected a positive"),
        ({"llama.rope.freq_base": float("nan")}, "freq_base = nan"),
        ({"tokenizer.ggml.tokens": None, "llama.vocab_size": None}, "vocab_size = None"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        spec_of(tmp_path, METADATA | changes)
    assert "spec.gguf" in str(caught.value)


# --- the conversion -------------------------------------------------------------------------------


def logits(spec: ModelSpec, params: Params, tokens: np.ndarray) -> np.ndarray:
    ids, decoder = jnp.asarray(tokens, jnp.int32), Decoder(spec=spec)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
    hidden, _ = jax.jit(decoder.apply)(params, ids, jnp.ones_like(ids), positions)
    head = decoder.head(params)
    flat = hidden.reshape(-1, spec.hidden_size) @ head.kernel
    return np.asarray(targets.finish(flat, head, spec.vocab_size)).reshape(*tokens.shape, -1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, *QUANTISED])
def test_tensors_are_exactly_the_dequantised_ones(tmp_path: Path, kind: Kind, tied: bool) -> None:
    spec = dataclasses.replace(SPEC, tied_head=tied)
    weights = hf_weights(spec)
    path = write_gguf(tmp_path / "x.gguf", gguf_weights(weights, spec), kind=kind)
    import_gguf(path, tmp_path / "out")
    assert hf.read_spec(tmp_path / "out") == spec
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == weights.keys()
    for name, value in weights.items():
        # Rows are quantised one by one, so that their order makes no difference.
        vector = value.ndim == 1 or kind == Kind.F32
        expected = value if vector else gguf.dequantize(gguf.quantize(value, kind), kind)
        np.testing.assert_array_equal(written[name], expected, err_msg=name)


def test_logits_of_a_quantised_model_are_near_those_of_its_source(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, SPEC.vocab_size, (2, 24))
    found = {}
    for kind in (Kind.F32, Kind.Q8_0):
        weights = {name: value / 2 for name, value in hf_weights(SPEC).items()}
        path = write_gguf(tmp_path / f"{kind}.gguf", gguf_weights(weights, SPEC), kind=kind)
        import_gguf(path, tmp_path / kind.name)
        found[kind] = logits(SPEC, hf.load(tmp_path / kind.name), tokens)
    scale = np.abs(found[Kind.F32]).max()
    assert 0 < np.abs(found[Kind.Q8_0] - found[Kind.F32]).max() < 0.05 * scale


@pytest.mark.slow
@pytest.mark.torch
def test_a_model_of_torch_keeps_its_logits(tmp_path: Path) -> None:
    torch_models = pytest.importorskip("torch_models")
    spec = dataclasses.replace(
        SPEC,
        rope_theta=500_000.0,
        max_positions=131_072,
        rope_scaling=dataclasses.replace(LLAMA3, factor=8.0),
        tied_head=False,
    )
    config = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.ffn_size,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": spec.rope_theta,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    }
    model = torch_models.random_model(tmp_path / "torch", torch_models.Variant("llama", config))
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    tensors = gguf_weights(weights, spec)
    tensors["rope_freqs.weight"] = llama3_divisors(spec.rope_theta, 32, spec.rope_scaling)
    metadata = spec_metadata(spec) | tokenizer_metadata(BYTES)
    import_gguf(write_gguf(tmp_path / "x.gguf", tensors, metadata), tmp_path / "out")
    assert hf.read_spec(tmp_path / "out") == spec
    tokens = np.random.default_rng(0).integers(0, spec.vocab_size, (2, 40))
    theirs, _ = torch_models.forward(model, tokens)
    ours = logits(spec, hf.load(tmp_path / "out"), tokens)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_the_directory_is_complete(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    import_gguf(small, out, dtype="bfloat16")
    check = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=out)
    assert check.returncode == 0
    assert {path.name for path in out.iterdir()} == {
        "README.md", "SHA256SUMS", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    card = (out / "README.md").read_text()
    digest = hashlib.sha256(small.read_bytes()).hexdigest()
    for said in ("license: mit", "# A random model", "`small.gguf`", digest, "nobody", "in F32"):
        assert said in card
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["eos_token_id"] == 279
    assert json.loads((out / "generation_config.json").read_text()) == {
        "bos_token_id": 278,
        "eos_token_id": 279,
    }
    assert load_file(out / "model.safetensors")["model.norm.weight"].dtype.name == "bfloat16"


def test_tensors_that_do_not_match_are_all_listed(tmp_path: Path) -> None:
    tensors = gguf_weights(hf_weights(SPEC), SPEC)
    del tensors["output_norm.weight"]
    tensors["blk.0.attn_q.bias"] = np.zeros(128, np.float32)
    tensors["blk.1.attn_k.weight"] = np.zeros((128, 64), np.float32)
    tensors["blk.0.ffn_norm.weight"] = np.zeros((64, 1), np.float32)
    path = write_gguf(tmp_path / "x.gguf", tensors)
    with pytest.raises(UserError) as caught:
        import_gguf(path, tmp_path / "out")
    for said in (
        "missing: model.norm.weight",
        "unexpected: blk.0.attn_q.bias",
        "model.layers.1.self_attn.k_proj.weight [128, 64] for [64, 64]",
        "model.layers.0.post_attention_layernorm.weight [64, 1] for [64]",
    ):
        assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = gguf_weights(hf_weights(SPEC), SPEC)
    tensors["blk.1.ffn_down.weight"][3, 3] = np.inf
    path = write_gguf(tmp_path / "x.gguf", tensors)
    with pytest.raises(
        StorageError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN or infinite"
    ):
        import_gguf(path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_the_command(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["import", str(small), str(out), "--end-token", START]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert Tokenizer(out).end_token == START
    # Generation stops at the file's end token too.
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [278, 279]
    (tmp_path / "cut.gguf").write_bytes(small.read_bytes()[:-1])
    assert cli.main(["import", str(tmp_path / "cut.gguf"), str(out)]) == StorageError.exit_code
    assert cli.main(["import", str(small), str(out), "--end-token", "the"]) == UserError.exit_code
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("ddk: error: ")]) == 2
    assert "cut.gguf: truncated or corrupt" in lines[-2]
    assert "small.gguf: end token 'the': choose a control token of the file" in lines[-1]


# --- the tokenizer --------------------------------------------------------------------------------

SAMPLES = st.lists(
    st.sampled_from(
        ["the", " model", "123", " 4", "\n", "  ", "\t", "'LL", "I'm", END, START, "=["]
    )
    | st.text(max_size=4),
    max_size=8,
).map("".join)


def rebuilt(
    tmp_path: Path, metadata: dict[str, Any], end_token: str = ""
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    write_tokenizer(metadata, tmp_path, end_token=end_token)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    return tokenizer, json.loads((tmp_path / "tokenizer_config.json").read_text())


@pytest.fixture(scope="module", params=["smollm", "gpt-2"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """A tokenizer made of tokenizers' own parts, and its like out of a file's metadata."""
    original = byte_tokenizer(digits=request.param == "smollm")
    metadata = tokenizer_metadata(original, request.param)
    return original, rebuilt(tmp_path_factory.mktemp("tokenizer"), metadata)[0]


@settings(max_examples=100)
@given(text=SAMPLES)
def test_ids_are_those_of_the_original(
    pair: tuple[tokenizers.Tokenizer, tokenizers.Tokenizer], text: str
) -> None:
    original, ours = pair
    for as_text in (False, True):
        original.encode_special_tokens = ours.encode_special_tokens = as_text
        ids = original.encode(text).ids
        assert ours.encode(text).ids == ids
        assert ours.decode(ids, skip_special_tokens=False) == original.decode(
            ids, skip_special_tokens=False
        )


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["x", " =", " 12345", "\n   ", " I", "'", "LL", " don", "'t", "  \t"]),
        (
            "smollm",
            ["x", " =", " ", *"12345", "\n   ", " I", "'", "LL", " don", "'t", "  \t"],
        ),
        (
            "llama-bpe",
            ["x", " =", " ", "123", "45", "\n", "   ", " I", "'LL", " don", "'t", "  \t"],
        ),
        ("qwen2", ["x", " =", " ", *"12345", "\n", "   ", " I", "'LL", " don", "'t", "  \t"]),
        ("tekken", ["x", " =", " ", *"12345", "\n", "   ", " I", "'LL", " don", "'t", "  \t"]),
        (
            "deepseek-coder",
            ["x", " = ", *"12345", "\n", "   ", " I", "'", "LL", " don", "'", "t", "  \t"],
        ),
    ],
)
def test_text_is_cut_into_words_by_the_named_rule(
    tmp_path: Path, pre: str, words: list[str]
) -> None:
    tokenizer, _ = rebuilt(tmp_path, tokenizer_metadata(BYTES, pre))
    text = "x = 12345\n    I'LL don't  \t"
    found = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:stop] for _, (start, stop) in found] == words


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("tekken", "fooBar BAZqux", ["foo", "Bar", " BAZqux"]),
        ("llama-bpe", "fooBar BAZqux", ["fooBar", " BAZqux"]),
        ("deepseek-coder", "a\u4f60\u597db \uac00", ["a", "\u4f60\u597d", "b", " ", "\uac00"]),
        ("qwen2", "e\u0301", ["\u00e9"]),
        ("llama-bpe", "e\u0301", ["e", "\u0301"]),
    ],
)
def test_letters_are_cut_by_the_named_rule(
    tmp_path: Path, pre: str, text: str, words: list[str]
) -> None:
    tokenizer, _ = rebuilt(tmp_path, tokenizer_metadata(BYTES, pre))
    text = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    found = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:stop] for _, (start, stop) in found] == words


def test_the_start_token_comes_first_where_it_should(tmp_path: Path) -> None:
    for pre, flag, starts in [
        ("smollm", None, False),
        ("smollm", True, True),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
    ]:
        metadata = tokenizer_metadata(BYTES, pre)
        if flag is not None:
            metadata["tokenizer.ggml.add_bos_token"] = flag
        tokenizer, _ = rebuilt(tmp_path, metadata)
        ids = tokenizer.encode("the").ids
        assert (ids[0] == 278) == starts
        assert tokenizer.encode("the", add_special_tokens=False).ids == ids[starts:]
    metadata |= {"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.add_bos_token": True}
    tokenizer, _ = rebuilt(tmp_path, metadata)
    assert [tokenizer.encode("", "").ids, tokenizer.encode("").ids] == [
        [278, 279, 278, 279],
        [278, 279],
    ]


def test_token_types_and_roles(tmp_path: Path) -> None:
    metadata = tokenizer_metadata(BYTES)
    metadata["tokenizer.ggml.tokens"] += ["<tool>", "[PAD281]", "[PAD282]"]
    metadata["tokenizer.ggml.token_type"] = np.append(
        metadata["tokenizer.ggml.token_type"], [4, 5, 5]
    )
    metadata |= {
        "tokenizer.ggml.padding_token_id": 281,  # unused, so there is none
        "tokenizer.ggml.unknown_token_id": 2**32 - 1,
        "llama.context_length": 77,
    }
    write_tokenizer(metadata, tmp_path, end_token=START)
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.end_token, tokenizer.end_id) == (281, START, 278)
    # What users may write is found in text, control tokens are not.
    ids = tokenizer.encode([f"<tool>{END}"])[0].tolist()
    assert ids[0] == 280 and not {278, 279} & set(ids)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == (START, START)
    assert config["chat_template"].startswith("{% for m") and config["model_max_length"] == 77
    assert "pad_token" not in config and "unk_token" not in config


@pytest.mark.slow
def test_transformers_reads_the_directory(small: Path, tmp_path: Path) -> None:
    import transformers

    import_gguf(small, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(TEXT)["input_ids"] == BYTES.encode(TEXT).ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (278, 279)
    messages = [{"role": "user", "content": "the"}, {"role": "user", "content": " model"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "the model"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer.ggml.pre": "viking"}, "'viking': how this tokenizer cuts text .* --tokenizer"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre = None: how this tokenizer cuts text"),
        ({"tokenizer.ggml.model": "bert"}, "'bert' is not supported, only 'gpt2' and 'llama'"),
        ({"tokenizer.ggml.model": None}, "model = None is not supported"),
        ({"tokenizer.ggml.tokens": None}, "the file has no tokens"),
        ({"tokenizer.ggml.merges": None}, "the file has no merges"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "merges do not fit the tokens"),
        ({"tokenizer.ggml.merges": ["the nonsense"]}, "merges do not fit the tokens"),
        ({"tokenizer.ggml.token_type": None}, "token_type: expected a number for each of 280"),
        ({"tokenizer.ggml.token_type": np.ones(7)}, "token_type: expected a number for each"),
        ({"tokenizer.ggml.tokens": ["a"] * 280}, "some tokens are in the file twice"),
        ({"tokenizer.ggml.eos_token_id": None}, f"end token '': choose .*: .*{END}"),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt_are_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    metadata = tokenizer_metadata(BYTES) | changes
    metadata = {key: value for key, value in metadata.items() if value is not None}
    # With tokens that are all alike, the end token is as well.
    end = "" if said.startswith("end") else END
    if "twice" in said:
        end = ""
    with pytest.raises(UserError, match=said.replace("|", r"\|")):
        write_tokenizer(metadata, tmp_path, end_token=end)


def test_a_given_tokenizer_takes_the_place_of_the_files(tmp_path: Path) -> None:
    tensors = gguf_weights(hf_weights(SPEC), SPEC)
    path = write_gguf(tmp_path / "x.gguf", tensors, METADATA | {"tokenizer.ggml.pre": "viking"})
    given = tmp_path / "tokenizer"
    given.mkdir()
    BYTES.save(str(given / "tokenizer.json"))
    with pytest.raises(UserError, match=r"x\.gguf: .*'viking'.*--tokenizer"):
        import_gguf(path, tmp_path / "out")
    with pytest.raises(UserError, match="name the end token as eos_token"):
        import_gguf(path, tmp_path / "out", tokenizer=given, end_token=END)
    import_gguf(path, tmp_path / "out", tokenizer=given)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        given / "tokenizer.json"
    ).read_bytes()
    other = byte_tokenizer(digits=False)
    other.save(str(given / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer\.json: not the tokenizer of this model: 2"):
        import_gguf(path, tmp_path / "out", tokenizer=given)


# --- SentencePiece --------------------------------------------------------------------------------

SPACE = "\u2581"


def spm_metadata(pieces: dict[str, float]) -> dict[str, Any]:
    """Pieces with their scores, behind the tokens that every such file has."""
    fixed = {"<unk>": 2, "<s>": 3, "</s>": 3} | {f"<0x{i:02X}>": 6 for i in range(256)}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*fixed, *pieces],
        "tokenizer.ggml.token_type": np.array([*fixed.values(), *[1] * len(pieces)], np.int32),
        "tokenizer.ggml.scores": np.array([0.0] * len(fixed) + [*pieces.values()], np.float32),
    }


def best_first(text: str, pieces: dict[str, float]) -> list[str]:
    """SentencePiece's BPE: again and again the neighbours whose union scores best, leftmost first;
    characters that are no pieces become bytes."""
    parts = list(SPACE + text.replace(" ", SPACE)) if text else []
    while True:
        unions = [
            (-pieces[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in pieces
        ]
        if not unions:
            break
        i = min(unions)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    known = [[p] if p in pieces else [f"<0x{b:02X}>" for b in p.encode()] for p in parts]
    return [token for tokens in known for token in tokens]


LETTERS = [SPACE, "a", "b", "c"]
PIECES = st.lists(st.text("abc" + SPACE, min_size=2, max_size=5), max_size=14, unique=True).flatmap(
    lambda found: st.permutations(sorted(set(found)))
)


@settings(max_examples=100)
@given(
    words=PIECES,
    runs=st.integers(0, 9),
    text=st.text("abc   \u00e9\n", max_size=24),
)
def test_sentencepiece_merges_the_best_scored_first(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], runs: int, text: str
) -> None:
    # A trained vocabulary grows out of itself: every piece is the union of two better ones.
    pieces = {letter: -1e6 - i for i, letter in enumerate(LETTERS)}
    for i, word in enumerate(words):
        if set(word) != {SPACE} and any(
            word[:k] in pieces and word[k:] in pieces for k in range(1, len(word))
        ):
            pieces[word] = -float(i)
    # Runs of spaces share the lowest score, as in Llama 2.
    pieces |= {SPACE * n: -1e9 for n in range(2, runs)}
    directory = tmp_path_factory.mktemp("spm")
    tokenizer, _ = rebuilt(directory, spm_metadata(pieces))
    encoding = tokenizer.encode(text, add_special_tokens=False)
    assert encoding.tokens == best_first(text, pieces)
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text


def test_sentencepiece_marks_its_ends_and_keeps_control_tokens_out_of_text(tmp_path: Path) -> None:
    pieces = {letter: -9.0 - i for i, letter in enumerate([SPACE, *"<s>"])}
    metadata = spm_metadata(pieces | {"<s": -1.0})
    write_tokenizer(metadata, tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.end_token, tokenizer.end_id) == ("</s>", 2)
    found = tokenizer.encode(["<s>"])[0].tolist()
    assert tokenizer.decode(found) == "<s>" and 1 not in found
    loaded = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert loaded.encode("s").ids[0] == 1
    plain = metadata | {"tokenizer.ggml.add_space_prefix": False}
    tokenizer, _ = rebuilt(tmp_path, plain)
    assert tokenizer.encode("s", add_special_tokens=False).tokens == ["s"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ab": -1.0, "ba": -1.0}, "'ab' and 'ba' have the same score"),
        ({"ax": -1.0}, "token 'ax' has characters that are no tokens"),
        ({"a" * 10**6: -1.0}, "token 'aaaaaaaaaaaaaaaaaaaa'... has 1000000 characters"),
    ],
)
def test_scores_that_leave_the_order_open_are_refused(
    tmp_path: Path, changes: dict[str, float], said: str
) -> None:
    pieces = {letter: -9.0 - i for i, letter in enumerate(LETTERS)}
    with pytest.raises(UserError, match=re.escape(said)):
        write_tokenizer(spm_metadata(pieces | changes), tmp_path)


def test_sentencepiece_without_its_parts_is_refused(tmp_path: Path) -> None:
    metadata = spm_metadata({letter: -9.0 - i for i, letter in enumerate(LETTERS)})
    short = metadata | {"tokenizer.ggml.scores": np.zeros(3, np.float32)}
    with pytest.raises(UserError, match=r"scores: expected a number for each of 263 tokens"):
        write_tokenizer(short, tmp_path)
    tokens = [token.replace("<0x0A>", "newline") for token in metadata["tokenizer.ggml.tokens"]]
    with pytest.raises(UserError, match=r"lacks byte tokens \(<0x0A>\)"):
        write_tokenizer(metadata | {"tokenizer.ggml.tokens": tokens}, tmp_path)


# --- a real model ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_has_all_its_tensors(smollm2_file: Path, smollm2: Path) -> None:
    digest = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert digest in (smollm2 / "README.md").read_text()
    assert len(container.read(smollm2_file).tensors) == 272
    assert num_parameters(hf.read_spec(smollm2)) == 134_515_008
    # It stops at the end of a document, and at that of a turn.
    assert json.loads((smollm2 / "generation_config.json").read_text())["eos_token_id"] == [0, 2]


@pytest.mark.slow
def test_smollm2_cuts_digits_as_llama_cpp_does(smollm2: Path) -> None:
    tokenizer = Tokenizer(smollm2)
    assert (tokenizer.vocab_size, tokenizer.end_id) == (49152, 0)
    ids = tokenizer.encode(["x = 12345\n    1", "<|im_start|>user"])
    assert ids[0].tolist() == [104, 446, 216, 33, 34, 35, 36, 37, 2367, 33]
    assert ids[1].min() > 16  # the control tokens are the first 17
    text = "def f(x):\n\treturn x ** 2  # \u00fc\u4f60\n"
    assert tokenizer.decode(tokenizer.encode([text])[0].tolist()) == text


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2: Path) -> None:
    tokenizer, spec = Tokenizer(smollm2), hf.read_spec(smollm2)
    prompt = np.array(tokenizer.encode(["The capital of France is"]), np.int32)
    following = logits(spec, hf.load(smollm2), prompt)[0, -1]
    assert tokenizer.decode([int(following.argmax())]) == " Paris"


@pytest.mark.slow
@pytest.mark.torch
def test_smollm2_has_the_logits_that_torch_gives(smollm2: Path) -> None:
    torch = pytest.importorskip("torch")
    import transformers

    transformers.logging.disable_progress_bar()
    text = Path(__file__).read_text()[:2000]
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    tokens = np.array([tokenizer(text)["input_ids"][:256]])
    assert tokens[0].tolist() == Tokenizer(smollm2).encode([text])[0][:256].tolist()
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    ours = logits(hf.read_spec(smollm2), hf.load(smollm2), tokens)
    assert np.abs(ours - theirs).max() < 1e-3
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
