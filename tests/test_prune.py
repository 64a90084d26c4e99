"""Structured pruning against the float64 reference: cuts, masks, importances."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_reference import SPEC, activated, attended, normed, numpy_states, randomised
from decoder_reference import layers_of as reference_layers
from hypothesis import given
from hypothesis import strategies as st
from test_decoder_switches import spec_of

from ddk_jax.data.rows import open_rows
from ddk_jax.errors import UserError
from ddk_jax.losses.chunked import ChunkPlan
from ddk_jax.models import families
from ddk_jax.models.decoder import Decoder, Params
from ddk_jax.models.prune import (
    Importance,
    Kept,
    Masks,
    Size,
    choose,
    first,
    masked,
    nearest_size,
    ones,
    prune,
    pruned_spec,
)
from ddk_jax.models.spec import ModelSpec
from ddk_jax.parallel.mesh import make_mesh
from ddk_jax.training.importance import measure_importance, sampled_batches
from ddk_jax.training.state import Batch

FEW = ("gemma", "neox", "gpt2", "olmo2", "gemma3", "starcoder2")
"""Variants that differ in what a cut has to mind."""
TOKENS = np.random.default_rng(5).integers(0, SPEC.vocab_size, 11, dtype=np.int32)
RMS = [name for name in FEW if spec_of(name).norm == "rms"]


@pytest.fixture(autouse=True)
def quick_programs() -> Iterator[None]:
    """Programs that compile quickly; they run once."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def kept_of(spec: ModelSpec, seed: int = 0, **sizes: int) -> Kept:
    """Random parts."""
    rng = np.random.default_rng(seed)
    shapes = first(spec)
    return choose(Importance(*(rng.random(x.shape) for x in shapes)), Size(**sizes))


def logits(params: Params, spec: ModelSpec) -> np.ndarray:
    return numpy_states(params, spec, TOKENS).logits


def changed(params: Params, spec: ModelSpec, change: Any) -> Params:
    """The parameters after `change(path, layer number or None, leaf)`."""

    def each(path: tuple[Any, ...], leaf: Any) -> Any:
        keys, leaf = [key.key for key in path], np.array(leaf)
        period, whole = len(spec.pattern), spec.num_layers // len(spec.pattern) * len(spec.pattern)
        if keys[0] == "layers":
            for i in range(len(leaf)):
                leaf[i] = change(keys[2:], i * period + int(keys[1]), leaf[i])
            return leaf
        if keys[0] == "tail":
            return change(keys[2:], whole + int(keys[1]), leaf)
        return change(keys, None, leaf)

    return jax.tree_util.tree_map_with_path(each, params)


# --- the cut ---


@pytest.mark.parametrize("variant", FEW)
def test_a_cut_by_nothing_is_the_model_bit_by_bit(variant):
    spec = spec_of(variant)
    params = randomised(Decoder(spec=spec))
    same, made = prune(params, spec, kept_of(spec))
    assert families.canonical(spec) == made
    same, again = prune(same, made, kept_of(made))
    assert again == made
    of_params = reference_layers(params, spec)
    for ours, theirs in zip(reference_layers(same, made), of_params, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    for name in params.keys() - {"layers", "tail"}:
        jax.tree.map(np.testing.assert_array_equal, same[name], params[name])


@pytest.mark.parametrize("variant", [name for name in FEW if spec_of(name).qk_norm != "all"])
def test_dead_heads_and_neurons_are_not_missed(variant):
    spec = spec_of(variant)
    kept = kept_of(spec, groups=max(1, spec.num_kv_heads // 2), neurons=17)
    share = spec.num_heads // spec.num_kv_heads

    def deaden(keys: list[str], layer: int | None, leaf: np.ndarray) -> np.ndarray:
        if keys == ["attn", "o"]:
            leaf[~np.repeat(np.isin(np.arange(spec.num_kv_heads), kept.groups[layer]), share)] = 0
        if keys == ["mlp", "down"]:
            leaf[~np.isin(np.arange(spec.ffn_size), kept.neurons[layer])] = 0
        return leaf

    params = changed(randomised(Decoder(spec=spec)), spec, deaden)
    cut, made = prune(params, spec, kept)
    assert made.num_kv_heads == kept.groups.shape[1] and made.ffn_size == 17
    assert made.num_heads == made.num_kv_heads * share and made.head_width == spec.head_width
    shapes = jax.tree.map(lambda leaf: leaf.shape, Decoder(spec=made).abstract())
    assert jax.tree.map(np.shape, cut) == shapes
    np.testing.assert_allclose(logits(cut, made), logits(params, spec), atol=1e-10)


@pytest.mark.parametrize("variant", RMS)
def test_dead_hidden_dimensions_are_not_missed(variant):
    spec = dataclasses.replace(spec_of(variant), norm_eps=1e-14)
    kept = kept_of(spec, hidden=19)
    dead = ~np.isin(np.arange(spec.hidden_size), kept.hidden)

    def deaden(keys: list[str], layer: int | None, leaf: np.ndarray) -> np.ndarray:
        if keys[0] == "embed" or keys[-1] in ("o", "down"):
            leaf[..., dead] = 0
        if keys[-1] in ("o_bias", "down_bias"):
            leaf[dead] = 0
        if keys[0] in ("attn_post_norm", "mlp_post_norm"):
            leaf[dead] = -1.0 if spec.norm_plus_one else 0.0
        return leaf

    params = changed(randomised(Decoder(spec=spec)), spec, deaden)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    cut, made = prune(exact, spec, kept)
    assert made.hidden_size == 19 and made.head_width == spec.head_width
    np.testing.assert_allclose(logits(cut, made), logits(params, spec), atol=1e-8)


@pytest.mark.parametrize("variant", FEW)
def test_layers_that_go_leave_the_others_as_they_are(variant):
    spec = dataclasses.replace(spec_of(variant), num_layers=5)
    params = randomised(Decoder(spec=spec))
    kept = Kept(np.array([0, 3, 4]), *kept_of(spec)[1:])
    cut, made = prune(params, spec, kept)
    assert made.num_layers == 3
    kinds = [spec.pattern[i % len(spec.pattern)] for i in (0, 3, 4)]
    assert [made.pattern[i % len(made.pattern)] for i in range(3)] == kinds
    layers = reference_layers(params, spec)
    for ours, theirs in zip(
        reference_layers(cut, made), [layers[i] for i in (0, 3, 4)], strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert np.all(np.isfinite(logits(cut, made)))


def test_a_narrow_model_reads_vectors_as_long_as_before():
    """What a norm gives keeps its length when the stream is cut."""
    spec = dataclasses.replace(SPEC, norm_eps=1e-14)
    params = randomised(Decoder(spec=spec))
    params["norm"]["scale"] = jnp.ones_like(params["norm"]["scale"])
    cut, made = prune(params, spec, kept_of(spec, hidden=13))
    for tree, shape in ((params, spec), (cut, made)):
        final = numpy_states(tree, shape, TOKENS).hidden[-1]
        np.testing.assert_allclose(np.linalg.norm(final, axis=1), np.sqrt(32), rtol=1e-6)


# --- masks ---


@pytest.mark.parametrize("variant", [name for name in FEW if spec_of(name).qk_norm != "all"])
def test_what_is_masked_by_0_can_be_cut(variant):
    spec = spec_of(variant)
    params = randomised(Decoder(spec=spec))
    kept = kept_of(spec, groups=max(1, spec.num_kv_heads // 2), neurons=17)
    groups, neurons = (np.zeros(mask.shape, np.float32) for mask in ones(spec)[1:])
    np.put_along_axis(groups, kept.groups, 1, axis=1)
    np.put_along_axis(neurons, kept.neurons, 1, axis=1)
    masks = Masks(ones(spec).hidden, jnp.asarray(groups), jnp.asarray(neurons))
    without = masked(params, spec, masks)
    np.testing.assert_allclose(logits(without, spec), logits(*prune(params, spec, kept)), atol=1e-6)


@pytest.mark.parametrize("variant", [n for n in FEW if spec_of(n).norm_placement != "post"])
def test_the_mask_of_the_hidden_dimensions_is_behind_the_norms_that_read_them(variant):
    spec = spec_of(variant)
    params = randomised(Decoder(spec=spec))
    mask = np.random.default_rng(2).uniform(0.5, 1.5, spec.hidden_size).astype(np.float32)

    def behind(keys: list[str], layer: int | None, leaf: np.ndarray) -> np.ndarray:
        if keys[0] in ("attn_norm", "mlp_norm", "norm"):
            plus = spec.norm_plus_one and keys[1] == "scale"
            return (leaf + plus) * mask - plus
        return leaf

    found = masked(params, spec, ones(spec)._replace(hidden=jnp.asarray(mask)))
    expected = logits(changed(params, spec, behind), spec)
    np.testing.assert_allclose(logits(found, spec), expected, atol=1e-4)


def test_masks_of_ones_change_nothing():
    for variant in ("gemma3", "olmo2"):
        spec = spec_of(variant)
        params = randomised(Decoder(spec=spec))
        same = logits(masked(params, spec, ones(spec)), spec)
        np.testing.assert_allclose(same, logits(params, spec), atol=1e-5)


# --- the choice ---


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9), st.data())
def test_the_most_important_parts_stay_in_their_order(values, data):
    wanted = data.draw(st.integers(1, len(values)))
    array = np.array(values, np.float64)
    importance = Importance(array, array, np.tile(array, (2, 1)), np.tile(-array, (2, 1)))
    kept = choose(importance, Size(layers=wanted, hidden=wanted, groups=wanted, neurons=wanted))
    assert list(kept.layers) == sorted(kept.layers) == sorted(set(kept.layers))
    best = sorted(range(len(values)), key=lambda i: (-values[i], i))[:wanted]
    assert list(kept.hidden) == sorted(best)
    assert kept.groups.tolist() == [sorted(best)] * 2
    worst = sorted(range(len(values)), key=lambda i: (values[i], i))[:wanted]
    assert kept.neurons.tolist() == [sorted(worst)] * 2


def test_the_first_parts_are_the_first_parts():
    kept = choose(first(SPEC), Size(layers=2, hidden=5, groups=1, neurons=3))
    assert kept.layers.tolist() == [0, 1] and kept.hidden.tolist() == [0, 1, 2, 3, 4]
    assert kept.groups.tolist() == [[0]] * 3 and kept.neurons.tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize(("name", "count"), [("layers", 4), ("hidden", 33), ("neurons", -1)])
def test_more_cannot_be_left_than_there_is(name, count):
    with pytest.raises(UserError, match=f"{count} {name} cannot be left: the model has"):
        choose(first(SPEC), Size(**{name: count}))


def test_the_nearest_width_is_taken_that_files_can_express():
    llama = dataclasses.replace(SPEC, head_dim=8, num_heads=6, num_kv_heads=3, hidden_size=48)
    assert nearest_size(llama, Size(hidden=40, groups=3)).hidden == 42  # a multiple of 6 heads
    assert nearest_size(llama, Size(hidden=40, groups=2)).hidden == 40
    assert nearest_size(llama, Size()) == Size(hidden=48)
    assert nearest_size(llama, Size(hidden=45)).hidden == 42  # of two, the narrower one
    made = pruned_spec(llama, choose(first(llama), nearest_size(llama, Size(hidden=40, groups=2))))
    families.config_from_spec(made)


# --- importance ---

ROWS = 2


def batch_of(seed: int) -> Batch:
    """Two rows: two documents, and one with padding."""
    tokens = np.random.default_rng(seed).integers(0, SPEC.vocab_size, (1, ROWS, 10), dtype=np.int32)
    segments = np.ones_like(tokens)
    segments[0, 0, 4:], segments[0, 1, 7:] = 2, 0
    return Batch(
        *map(
            jnp.asarray, (tokens, segments, np.minimum(segments, 1), np.zeros((1, ROWS), np.int32))
        )
    )


def documents_of(batch: Batch) -> list[np.ndarray]:
    tokens = np.asarray(batch.tokens[0])
    return [tokens[0, :4], tokens[0, 4:], tokens[1, :7]]


def measured(method: str, params: Params, spec: ModelSpec, batches: list[Batch]) -> Importance:
    return measure_importance(
        Decoder(spec=spec),
        params,
        batches,
        method=method,
        mesh=make_mesh(devices=jax.devices("cpu")[:1]),
        plan=ChunkPlan(tokens=8, vocab_size=spec.vocab_size),
    )


def mean_nats(params: Params, spec: ModelSpec, batch: Batch) -> float:
    """By the float64 reference."""
    nats = []
    for document in documents_of(batch):
        z = numpy_states(params, spec, document).logits[:-1]
        log_sum = np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1)) + z.max(-1)
        nats += list(log_sum - z[np.arange(len(z)), document[1:]])
    return float(np.mean(nats))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gemma3", "olmo2", "neox"])
def test_importance_by_gradient_equals_finite_differences(variant):
    spec = dataclasses.replace(spec_of(variant), num_layers=4)
    params = randomised(Decoder(spec=spec))
    batches = [batch_of(1), batch_of(2)]
    found = measured("gradient", params, spec, batches)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def scaled(name: str, index: tuple[int, ...], factor: float) -> Params:
        """The model with one part multiplied, written once more."""

        def each(keys: list[str], layer: int | None, leaf: np.ndarray) -> np.ndarray:
            leaf = np.array(leaf)
            share = spec.num_heads // spec.num_kv_heads
            if name == "groups" and keys == ["attn", "o"] and layer == index[0]:
                leaf[index[1] * share : (index[1] + 1) * share] *= factor
            if name == "neurons" and keys == ["mlp", "down"] and layer == index[0]:
                leaf[index[1]] *= factor
            if name == "hidden":
                if keys[-1] in ("q", "k", "v", "gate", "up"):
                    leaf[index] *= factor
                elif keys == ["norm", "scale"]:
                    leaf[index] = (leaf[index] + spec.norm_plus_one) * factor - spec.norm_plus_one
                elif keys == ["norm", "bias"]:
                    leaf[index] *= factor
            return leaf

        return changed(exact, spec, each)

    step = 1e-5
    for name, index in (
        ("hidden", (3,)),
        ("hidden", (31,)),
        ("groups", (0, 0)),
        ("groups", (3, spec.num_kv_heads - 1)),
        ("neurons", (2, 7)),
    ):
        slopes = [
            (
                mean_nats(scaled(name, index, 1 + step), spec, batch)
                - mean_nats(scaled(name, index, 1 - step), spec, batch)
            )
            / (2 * step)
            for batch in batches
        ]
        ours = getattr(found, name)[index]
        assert ours == pytest.approx(sum(map(abs, slopes)), rel=2e-3, abs=1e-5), (name, index)


@pytest.mark.parametrize("variant", ["gemma3", pytest.param("starcoder2", marks=pytest.mark.slow)])
def test_importance_by_activation_equals_the_reference(variant):
    spec = dataclasses.replace(spec_of(variant), num_layers=3)
    params = randomised(Decoder(spec=spec))
    batch = batch_of(1)
    found = measured("activation", params, spec, [batch])
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    layers = reference_layers(exact, spec)
    hidden: list[np.ndarray] = []
    groups, neurons, influence = [], [], []
    for number, layer in enumerate(layers):
        kind = spec.pattern[number % len(spec.pattern)]
        rows: dict[str, list[np.ndarray]] = {"heads": [], "inner": [], "turn": [], "read": []}
        # A row predicts all tokens but its last, which is not read.
        for document in (d if i != 1 else d[:-1] for i, d in enumerate(documents_of(batch))):
            x = numpy_states(exact, spec, document).hidden[number]
            y = normed(spec, x, layer["attn_norm"], np)
            H, D = spec.num_heads, spec.head_width
            eye = {"o": np.eye(H * D).reshape(H, D, H * D), "o_bias": np.zeros(H * D)}
            heads, _ = attended(layer["attn"] | eye, spec, kind, y, np, 0)
            read = np.tensordot(heads.reshape(-1, H, D), layer["attn"]["o"], 2)
            middle = x + read + layer["attn"].get("o_bias", 0)
            z = normed(spec, middle, layer["mlp_norm"], np)
            mlp = layer["mlp"]
            inner = z @ mlp["up"] + mlp.get("up_bias", 0)
            if spec.gated_mlp:
                inner = activated(spec.activation, z @ mlp["gate"], np) * inner
            else:
                inner = activated(spec.activation, inner, np)
            out = middle + inner @ mlp["down"] + mlp.get("down_bias", 0)
            cosine = (x * out).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(out, axis=-1)
            rows["heads"] += list(heads**2)
            rows["inner"] += list(inner**2)
            rows["turn"] += list(1 - cosine)
            rows["read"] += list(y**2 + z**2)
        hidden.append(np.mean(rows["read"], axis=0))
        groups.append(np.mean(rows["heads"], axis=0).reshape(spec.num_kv_heads, -1).sum(-1))
        neurons.append(np.mean(rows["inner"], axis=0))
        influence.append(np.mean(rows["turn"]))
    np.testing.assert_allclose(found.hidden, np.sum(hidden, axis=0), rtol=1e-4)
    np.testing.assert_allclose(found.groups, groups, rtol=1e-4)
    np.testing.assert_allclose(found.neurons, neurons, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.layers, influence, rtol=1e-4)


@pytest.mark.parametrize("method", ["activation", pytest.param("gradient", marks=pytest.mark.slow)])
def test_importance_moves_with_the_parts(method):
    """In another order, heads, neurons and hidden dimensions have their importances in that one."""
    spec = dataclasses.replace(SPEC, num_layers=2)
    params = randomised(Decoder(spec=spec))
    rng = np.random.default_rng(3)
    hidden, neurons, groups = (rng.permutation(n) for n in (32, 48, 2))
    heads = (groups[:, None] * 2 + np.arange(2)).reshape(-1)
    order = {"embed": hidden, "norm": hidden, "ffn": neurons, "kv_heads": groups, "heads": heads}

    def moved(leaf: Any, axes: tuple[str, ...]) -> Any:
        for axis, name in enumerate(axes):
            leaf = np.take(leaf, order[name], axis) if name in order else leaf
        return leaf

    axes = Decoder(spec=spec).logical_axes()
    shuffled = jax.tree.map(moved, jax.tree.map(np.asarray, params), axes)
    batches = [batch_of(1)]
    before, after = (measured(method, tree, spec, batches) for tree in (params, shuffled))
    np.testing.assert_allclose(after.hidden, before.hidden[hidden], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(after.neurons, before.neurons[:, neurons], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(after.groups, before.groups[:, groups], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(after.layers, before.layers, rtol=1e-4)


def test_sampled_rows_are_the_same_again_and_from_every_domain(tiny_root):
    rows = open_rows(tiny_root / "data", "train", 16)
    one, again, other = (list(sampled_batches(rows, 5, 4, seed)) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert any(not np.array_equal(a.tokens, b.tokens) for a, b in zip(one, other, strict=True))
    assert [int(batch.domain[0]) for batch in one] == [0, 0, 1, 1, 2, 2]
    assert all((batch.domain == batch.domain[0]).all() for batch in one)
    drawn = [int((batch.segment_ids[:, 0] > 0).sum()) for batch in one]
    assert drawn == [4, 1] * 3
    everything = list(sampled_batches(rows[:1], 10**6, 4, 0))
    assert sum(int((batch.segment_ids[:, 0] > 0).sum()) for batch in everything) == len(rows[0])
