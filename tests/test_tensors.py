"""Safetensors files and their parts, and how a part becomes a parameter."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save, save_file

from ddk_jax.models import tensors as tensors_module
from ddk_jax.models.families import Placement, Rows
from ddk_jax.models.layout import (
    arranged,
    part_axes,
    part_shape,
    read_part,
    stored_part,
    stored_shape,
    write_part,
)
from ddk_jax.models.tensors import (
    FLOAT_TYPES,
    StoredFile,
    StoredTensor,
    Tensor,
    header_bytes,
    read_header,
)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def numbers(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def opened(file: StoredFile, name: str = "x") -> StoredTensor:
    return StoredTensor(file, read_header(file)[name])


def draw_index(data: st.DataObject, shape: tuple[int, ...]) -> tuple[slice, ...]:
    index = []
    for size in shape:
        start = data.draw(st.integers(0, max(size - 1, 0)))
        index.append(slice(start, data.draw(st.integers(start, size))))
    return tuple(index)


# --- files ----------------------------------------------------------------------------------------


@given(data=st.data())
def test_any_part_of_a_tensor_reads_as_the_slice_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 7), max_size=4)))
    dtype = data.draw(st.sampled_from(sorted(FLOAT_TYPES)))
    values = numbers(shape, FLOAT_TYPES[dtype])
    path = tmp_path_factory.mktemp("part") / "x.safetensors"
    save_file({"before": numbers((3,)), "x": values, "z": numbers((2,))}, path)
    file = StoredFile(path)
    file.gap = data.draw(st.sampled_from([0, 8, 64, 2**15]))
    tensor = opened(file)
    index = draw_index(data, shape)
    part = tensor[index]
    file.close()
    assert part.dtype == values.dtype and tensor.get_shape() == list(shape)
    assert part.shape == values[index].shape and part.tobytes() == values[index].tobytes()


def test_tensors_and_those_of_safetensors_are_of_one_kind(tmp_path: Path) -> None:
    values = numbers((4, 6))
    save_file({"x": values}, tmp_path / "x.safetensors")
    file = StoredFile(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as theirs:
        for tensor in (opened(file), theirs.get_slice("x")):
            assert isinstance(tensor, Tensor)
            assert (tensor.get_shape(), tensor.get_dtype()) == ([4, 6], "F32")
            np.testing.assert_array_equal(tensor[1:3, 2:5], values[1:3, 2:5])
    file.close()


def test_blocks_that_are_read_across_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors_module, "_BLOCK_BYTES", 100)
    values = numbers((50, 8))
    save_file({"x": values}, tmp_path / "x.safetensors")
    file = StoredFile(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(opened(file)[3:49, 2:5], values[3:49, 2:5])
    file.close()


def test_a_bucket_is_read_in_ranges_and_only_where_it_must(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = numbers((1000, 200))
    bucket().pipe_file("gs://b/x", save({"x": values}))
    file = StoredFile(epath.Path("gs://b/x"))
    tensor = opened(file)
    assert bucket.reads == [("x", 0, tensors_module._HEADER_GUESS)]
    bucket.reads.clear()
    np.testing.assert_array_equal(tensor[100:200, :], values[100:200])
    assert bucket.reads == [("x", tensor.entry.start + 80_000, 80_000)]
    bucket.reads.clear()

    # Columns: what is between them is read too, until it is long enough to be worth a request.
    np.testing.assert_array_equal(tensor[0:10, 5:10], values[:10, 5:10])
    assert [size for *_, size in bucket.reads] == [8_000]
    file.gap = 100
    bucket.reads.clear()
    np.testing.assert_array_equal(tensor[0:10, 5:10], values[:10, 5:10])
    assert [size for *_, size in bucket.reads] == [20] * 10

    monkeypatch.setattr(tensors_module, "_PIECE_BYTES", 100_000)  # read by several threads
    bucket.reads.clear()
    np.testing.assert_array_equal(tensor[:, :], values)
    assert sorted(size for *_, size in bucket.reads) == [100_000] * 8
    file.close()


def test_a_file_that_becomes_shorter_is_noticed(bucket: Any, tmp_path: Path) -> None:
    content = save({"x": numbers((100,))})
    for path in (tmp_path / "x", epath.Path("gs://b/x")):
        path.write_bytes(content)
        file = StoredFile(path)
        tensor = opened(file)
        path.write_bytes(content[:-8])
        with pytest.raises(OSError, match=f"x: ends at byte {len(content) - 8}"):
            tensor[0:100,]
        file.close()


def header_of(path: Path) -> dict[str, Any] | str:
    """The header, or why it is refused."""
    file = StoredFile(path)
    try:
        return read_header(file)
    except ValueError as error:
        return str(error)
    finally:
        file.close()


def written(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    size = len(header) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + header + data)
    return path


def one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"x": one(offsets=[0, 4])}, "x of type F32 and shape"),
        ({"x": one(offsets=[4, 12])}, "x begins at byte"),
        ({"x": one(shape=[1], offsets=[0, 4])}, "the tensors end at byte"),
        ({"x": one(), "y": one()}, "y begins at byte"),
        ({"x": one(), "y": one(shape=[1], offsets=[4, 8])}, "y begins at byte"),
        ({"x": one(shape=[-2])}, "x has the shape"),
        ({"x": one(shape=[2.0])}, "x has the shape"),
        ({"x": one(shape=[True, 2])}, "x has the shape"),
        ({"x": one(shape="2")}, "x has the shape"),
        ({"x": one(offsets=[0, 8, 8])}, "x has the shape"),
        ({"x": one(offsets=[8, 0])}, "x of type F32"),
        ({"x": one(dtype="F33")}, "unknown type 'F33'"),
        ({"x": one(dtype=["F32"])}, "unknown type"),
        ({"x": one(dtype="F4", shape=[1], offsets=[0, 0])}, "x of type F4"),
        ({"x": [1]}, "x lacks a type"),
        ({"x": {"dtype": "F32", "shape": [2]}}, "x lacks a type"),
        ({"__metadata__": {"a": 1}, "x": one()}, "metadata"),
        ({"__metadata__": [], "x": one()}, "metadata"),
        ({"x": one(shape=[2**62, 2**62, 2])}, "x of type F32"),
    ],
)
def test_headers_that_contradict_themselves_or_the_file_are_refused(
    tmp_path: Path, tree: dict[str, Any], said: str
) -> None:
    path = written(tmp_path / "x", json.dumps(tree).encode(), bytes(8))
    assert said in header_of(path)
    with pytest.raises((SafetensorError, OverflowError)), safe_open(path, framework="numpy"):
        pass  # nor does safetensors read it


def test_headers_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    same = b'"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    for header, said in (
        (b"[1]", "does not begin with a brace"),
        (b' {"a": 1}', "does not begin with a brace"),
        (b"{" + b"[" * 100_000, "not a JSON object"),
        (b"{" + same + b"," + same + b"}", "a name is there twice"),
        (b'{"x\xff": 1}', "not a JSON object"),
        (b"{", "not a JSON object"),
    ):
        assert said in header_of(written(path, header, bytes(8)))
    assert "a header of 99 bytes" in header_of(written(path, b"{}", length=99))
    path.write_bytes(b"1234")
    assert header_of(path) == "4 bytes, which is too short"
    assert header_of(written(path, b"{}      ")) == {}


@settings(max_examples=200)
@given(data=st.data())
def test_what_is_read_safetensors_reads_too(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(save({"x": numbers((2, 3)), "y": numbers((4,), np.float16)}))
    length = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, length - 1))
        content[place] = data.draw(st.sampled_from(b'0123456789",:{}[] FxyI\0\xff'))
    path = tmp_path_factory.mktemp("noise") / "x"
    path.write_bytes(content)
    header = header_of(path)
    if not isinstance(header, str):
        with safe_open(path, framework="numpy") as theirs:
            assert set(theirs.keys()) == set(header)
            for name, entry in header.items():
                assert theirs.get_slice(name).get_shape() == list(entry.shape)


def test_headers_are_written_as_safetensors_wants_them(tmp_path: Path) -> None:
    values = {"b": numbers((2, 3), BFLOAT16), "a": numbers((5,)), "none": numbers((0, 3))}
    names = {dtype: name for name, dtype in FLOAT_TYPES.items()}
    header = header_bytes({name: (names[v.dtype], v.shape) for name, v in values.items()})
    assert len(header) % 8 == 0
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + b"".join(v.tobytes() for v in values.values()))
    for name, found in load_file(path).items():
        np.testing.assert_array_equal(found, values[name])
    with safe_open(path, framework="numpy") as theirs:
        assert theirs.metadata() == {"format": "pt"}
    entries = header_of(path)
    assert isinstance(entries, dict) and list(entries) == list(values)


# --- layouts --------------------------------------------------------------------------------------


@st.composite
def placements(draw: st.DrawFn) -> tuple[list[Placement], list[tuple[int, ...]]]:
    """The placements that share one tensor, and the shapes of their parameters."""
    inputs = draw(st.sampled_from([None, 0, 1, 2]))
    conv = draw(st.booleans())
    sizes = st.integers(1, 4)
    if inputs is None:
        shape = tuple(draw(st.lists(sizes, min_size=1, max_size=3)))
        return [Placement("x", ("p0",), None)], [shape]
    first = tuple(draw(st.lists(sizes, min_size=inputs, max_size=inputs)))
    if draw(st.booleans()):
        last = tuple(draw(st.lists(sizes, min_size=1, max_size=2)))
        return [Placement("x", ("p0",), None, inputs, conv)], [(*first, *last)]
    # Several parameters of [groups, width] outputs share the rows of every group.
    groups, widths = draw(sizes), draw(st.lists(sizes, min_size=2, max_size=3))
    places, start = [], 0
    for i, width in enumerate(widths):
        rows = Rows(groups, start, width, sum(widths))
        places.append(Placement("x", (f"p{i}",), None, inputs, conv, rows))
        start += width
    split = draw(st.booleans())
    outputs = [(groups, width) if split else (groups * width,) for width in widths]
    return places, [(*first, *last) for last in outputs]


def theirs_by_hand(place: Placement, value: np.ndarray, whole: np.ndarray) -> None:
    """Fill in the numbers of one parameter, one by one."""
    inputs = place.inputs or 0
    columns, rows = math.prod(value.shape[:inputs]), math.prod(value.shape[inputs:])
    for row in range(rows):
        group, within = divmod(row, place.rows.size) if place.rows else (0, row)
        at = group * place.rows.total + place.rows.start + within if place.rows else row
        for column in range(columns):
            number = value.reshape(columns, rows)[column, row]
            if not inputs:
                whole[at] = number
            elif place.conv:
                whole[column, at] = number
            else:
                whole[at, column] = number


@settings(max_examples=150)
@given(found=placements(), data=st.data())
def test_parts_are_read_from_and_written_to_shared_tensors(
    found: tuple[list[Placement], list[tuple[int, ...]]], data: st.DataObject
) -> None:
    places, shapes = found
    values = [numbers(shape, seed=i) for i, shape in enumerate(shapes)]
    (size,) = {stored_shape(*pair) for pair in zip(places, shapes, strict=True)}
    expected, whole = np.zeros(size, np.float32), np.zeros(size, np.float32)
    for place, value in zip(places, values, strict=True):
        if place.inputs is None:
            expected[...] = value
        else:
            theirs_by_hand(place, value, expected)
        write_part(whole, place, stored_part(value, place))
    np.testing.assert_array_equal(whole, expected)
    assert (expected != 0).all()  # the parts cover it

    tensor = _InMemory(whole)
    for place, value in zip(places, values, strict=True):
        size = part_shape(place, value.shape)
        part = read_part(tensor, place, [slice(0, n) for n in size])
        np.testing.assert_array_equal(arranged(part, place, value.shape), value)
        index = draw_index(data, size)
        assume(all(s.stop > s.start for s in index))
        np.testing.assert_array_equal(read_part(tensor, place, index), part[index])


class _InMemory:
    """An array as a tensor to be read."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.indices: list[tuple[slice, ...]] = []

    def get_shape(self) -> list[int]:
        return list(self.values.shape)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        self.indices.append(index)
        return self.values[index]


def test_only_the_rows_of_the_wanted_groups_are_asked_for() -> None:
    tensor = _InMemory(numbers((8 * 6, 5)))
    place = Placement("x", ("q",), None, 1, rows=Rows(groups=8, start=2, size=2, total=6))
    read_part(tensor, place, [slice(4, 8), slice(0, 2)])  # the third and the fourth group
    assert tensor.indices == [
        (slice(14, 16), slice(0, 2)),
        (slice(20, 22), slice(0, 2)),
    ]


def test_what_holds_for_axes_of_the_parameter_holds_for_those_of_the_part() -> None:
    kernel = Placement("x", ("o",), None, 2)
    assert part_axes(kernel, ["heads", None, "embed"]) == ("embed", "heads")
    assert part_axes(kernel._replace(conv=True), ["heads", None, "embed"]) == ("heads", "embed")
    assert part_axes(kernel._replace(inputs=1), ["embed", "heads", None]) == ("heads", "embed")
    assert part_axes(kernel._replace(inputs=0), ["heads", None]) == ("heads",)
    assert part_axes(kernel._replace(inputs=None), ["vocab", "embed"]) == ("vocab", "embed")
