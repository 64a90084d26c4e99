"""Selection from a vocabulary in blocks, and programs in which nothing of its size travels."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import loss_table as table
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from loss_table import CASES, compiled
from quick import QUICK

from ddk_jax.losses.top_k import gather, members, search, top_k, up_to
from ddk_jax.parallel.mesh import make_mesh

N, V = 5, 24


def with_ties(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-3, 4, (N, V)).astype(np.float32)


@pytest.mark.parametrize(("k", "shards"), [(1, 4), (5, 1), (5, 4), (9, 4), (24, 1), (24, 3)])
def test_top_k_is_exact_and_ties_go_to_the_lowest_id(k: int, shards: int) -> None:
    # At k = 9 a block of 6 entries has fewer than k.
    for seed in range(3):
        logits = with_ties(seed)
        logits[0, ::5] = -np.inf
        values, ids = compiled(top_k, logits, k=k, shards=shards)
        expected = table.order(logits)[:, :k]
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_array_equal(values, np.take_along_axis(logits, expected, axis=1))


@pytest.mark.parametrize("shards", [1, 4])
def test_a_nan_is_the_largest(shards: int) -> None:
    logits = with_ties(0)
    logits[:, 17] = np.nan
    np.testing.assert_array_equal(compiled(top_k, logits, k=3, shards=shards)[1][:, 0], 17)


def test_the_entries_up_to_the_last_of_a_top_k_are_those_of_the_top_k() -> None:
    def marks(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, ids = top_k(logits, 7)
        return up_to(logits, values[:, -1], ids[:, -1]), members(ids, V)

    logits = with_ties(1)
    for marked in compiled(marks, logits):
        np.testing.assert_array_equal(marked, table.among_first(logits, 7))


@pytest.mark.parametrize("shards", [1, 4])
def test_gather_and_its_gradient(shards: int) -> None:
    rng = np.random.default_rng(2)
    logits, factors = rng.normal(size=(N, V)), rng.normal(size=(N, 9))
    ids = rng.integers(0, V, (N, 9))
    ids[:, 1] = ids[:, 0]  # an entry that is asked for twice

    def total(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = gather(logits, jnp.asarray(ids, jnp.int32), shards)
        return jnp.sum(values * jnp.asarray(factors, jnp.float32)), values

    logits = logits.astype(np.float32)
    gradient, values = compiled(jax.grad(total, has_aux=True), logits)
    np.testing.assert_array_equal(values, np.take_along_axis(logits, ids, axis=1))
    expected = np.zeros((N, V))
    np.add.at(expected, (np.arange(N)[:, None], ids), factors)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shards", [1, 4])
def test_members_marks_what_is_in_range(shards: int) -> None:
    ids = np.array([[0, 5, 6, 23], [V, V + 1, 11, 11]])
    marked = compiled(members, ids.astype(np.int32), vocabulary=V, shards=shards)
    expected = [sorted({i for i in row if i < V}) for row in ids.tolist()]
    assert [np.flatnonzero(row).tolist() for row in np.asarray(marked)] == expected


@pytest.mark.parametrize("shards", [1, 4, 24])
def test_search_inverts_a_cumulative_sum(shards: int) -> None:
    rng = np.random.default_rng(3)
    steps = rng.integers(0, 4, (N, V)) * rng.integers(0, 2**24, (N, V))  # some are 0
    steps[1] = 0
    steps[1, 13] = 1
    total = steps.sum(axis=1)
    positions = (rng.random((N, 50)) * total[:, None]).astype(np.int64)
    positions[:, 0], positions[:, 1] = 0, total - 1
    ends = np.cumsum(steps, axis=1)
    expected = [np.searchsorted(e, p, side="right") for e, p in zip(ends, positions, strict=True)]
    found = compiled(search, steps.astype(np.int32), positions.astype(np.int32), shards=shards)
    np.testing.assert_array_equal(found, expected)


# On a mesh: two data shards, each vocabulary on four devices

WIDE = 192
"""A vocabulary whose blocks, of 48 entries, are larger than all else in the program."""
SORTS = [name for name in table.PLAIN if CASES[name].sorts]


@pytest.fixture(scope="module")
def on_mesh(devices: list[jax.Device]) -> tuple[table.Logits, table.Answers, str]:
    """The problem, what all losses and their gradients are, and the compiled program."""
    mesh = make_mesh(2, 1, 4, devices=devices)
    x = table.logits(3, vocabulary=WIDE, temperature=1.5)
    rows, blocks = (NamedSharding(mesh, PartitionSpec(*s)) for s in (("data",), ("data", "tensor")))

    def local(*arrays: Any) -> Any:
        return table.value_and_gradient(*arrays, names=table.PLAIN, shards=4)

    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(*[PartitionSpec("data")] * 4, PartitionSpec()),
        out_specs=PartitionSpec("data"),
        axis_names={"data"},
    )
    arguments = (
        jax.device_put(x.student.astype(np.float32), blocks),
        jax.device_put(x.teacher.astype(np.float32), blocks),
        jax.device_put(x.labels.astype(np.int32), rows),
        jax.device_put(x.draw, rows),
        jnp.float32(x.temperature),
    )
    function = jax.jit(sharded, out_shardings=dict.fromkeys(table.PLAIN, (rows, blocks)))
    program = function.lower(*arguments).compile(compiler_options=QUICK)
    return x, jax.tree.map(np.asarray, program(*arguments)), program.as_text() or ""


@pytest.mark.slow
def test_losses_on_a_sharded_vocabulary_are_those_of_the_reference(
    on_mesh: tuple[table.Logits, table.Answers, str],
) -> None:
    x, found, _ = on_mesh
    for name in table.PLAIN:
        nats, gradient = found[name]
        np.testing.assert_allclose(nats, table.reference(name, x), rtol=2e-5, atol=2e-6)
        expected = table.reference_gradient(name, x) if "sampled" in name else None
        if expected is not None:
            np.testing.assert_allclose(gradient, expected, atol=1e-5)


def collectives(program: str) -> list[tuple[str, int]]:
    """What the result of every collective belongs to, and its longest axis."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = []
    for line in program.splitlines():
        if match := re.match(rf"\s+(?:ROOT )?\S+ = (.+?) (?:{kinds})(?:-start)?\(", line):
            sizes = [
                int(n) for n in re.findall(r"\d+", " ".join(re.findall(r"\[(.*?)\]", match[1])))
            ]
            name = re.search(r'op_name="([^"]*)"', line)
            found.append((name[1] if name else "", max(sizes, default=1)))
    return found


@pytest.mark.slow
def test_only_losses_that_sort_the_vocabulary_gather_it(
    on_mesh: tuple[table.Logits, table.Answers, str],
) -> None:
    found = collectives(on_mesh[2])
    large = {name for name, size in found if size >= WIDE // 4}
    assert large and all(any(f"/{loss}/" in name for loss in SORTS) for name in large), large
    # ... and candidates of the blocks are what all others gather: 4 * k of them.
    assert max(size for name, size in found if name not in large) == 4 * 8


def test_losses_that_gather_the_vocabulary_say_so() -> None:
    for case in CASES.values():
        if case.sorts:
            assert "gathered if" in " ".join((case.loss.__doc__ or "").split())
