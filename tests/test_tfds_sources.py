"""Data sets in TFDS's format, made as its users make them; TensorFlow is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import write_tokenizer

from ddk_jax.config import DataConfig, DomainConfig, SourceConfig
from ddk_jax.data import sources
from ddk_jax.data.prepare import prepare
from ddk_jax.data.sources import Document, Reject, Turn, documents_of, pieces_of, read_piece
from ddk_jax.errors import DataError

# In a process of its own: TFDS keeps every builder class that it has seen in a registry, and the
# point is that a builder that is not there is found by its files.
MAKE = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class LocalText(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("words", "chat")]

    def _info(self):
        text = tfds.features.Text()
        features = {"text": text, "meta": {"lang": text, "n": tfds.features.Scalar(np.int64)}}
        if self.builder_config.name == "chat":
            features = {"messages": tfds.features.Sequence({"role": text, "content": text})}
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features, description="Local text.")

    def _split_generators(self, download):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        for i in range(40):
            if self.builder_config.name == "chat":
                said = ("user", f"{i}?"), ("assistant", "y")
                turns = [{"role": role, "content": content} for role, content in said]
                yield i, {"messages": turns}
            else:
                yield i, {"text": f"number {i} \\u00e9", "meta": {"lang": "en", "n": i}}

for name in ("words", "chat"):
    builder = LocalText(data_dir=sys.argv[1], config=name, file_format="array_record")
    builder.download_and_prepare()
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tfds")
    command = [sys.executable, "-W", "ignore", "-c", MAKE, str(folder)]
    subprocess.run(command, check=True, timeout=200, capture_output=True)
    return str(folder)


def read(source: SourceConfig) -> list[Document | Reject]:
    found: list[Document | Reject] = []
    for piece in pieces_of(source):
        for row in read_piece(piece, source):
            found += [row] if isinstance(row, Reject) else documents_of(row, piece.name, source)
    return found


def test_a_builder_that_is_not_there_is_found_by_its_files(
    data_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SourceConfig(path="tfds:local_text/words", data_dir=data_dir)
    found = read(source)
    assert sorted(item.text for item in found if isinstance(item, Document)) == sorted(
        f"number {i} \xe9" for i in range(40)
    )
    assert [item.line for item in found if isinstance(item, Document)] == list(range(1, 41))
    monkeypatch.setattr(sources, "PIECE_BYTES", 2_000)
    assert len(list(pieces_of(source))) > 1
    assert read(source) == found
    part = SourceConfig(path="tfds:local_text/words", data_dir=data_dir, split="test[:25%]")
    assert len(read(part)) == 10
    [file] = sources.files_of(part)
    assert file.name == "tfds:local_text/words/local_text-test.array_record-00000-of-00001"
    assert "tensorflow" not in sys.modules


def test_nested_fields_and_conversations(data_dir: str) -> None:
    source = SourceConfig(path="tfds:local_text/words", data_dir=data_dir, text="meta.lang")
    assert {item.text for item in read(source) if isinstance(item, Document)} == {"en"}
    chat = SourceConfig(path="tfds:local_text/chat", data_dir=data_dir, messages="messages")
    turns = [item.turns for item in read(chat) if isinstance(item, Document)]
    assert (Turn("user", "7?"), Turn("assistant", "y")) in turns and len(turns) == 40


@pytest.mark.parametrize(
    ("path", "split", "message"),
    [
        ("tfds:nothing/words", "train", "no such data set in"),
        ("tfds:local_text/words", "none", "Unknown split 'none'"),
        ("tfds:ag_news_subset", "train", "make it with TFDS first"),
    ],
)
def test_what_is_not_there_is_one_line(data_dir: str, path: str, split: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(pieces_of(SourceConfig(path=path, split=split, data_dir=data_dir)))
    assert "\n" not in str(caught.value)


def test_the_tokens_are_those_of_the_same_text_in_jsonl(data_dir: str, tmp_path: Path) -> None:
    tokenizer_dir = write_tokenizer(tmp_path / "tokenizer")
    rows = [{"text": f"number {i} \xe9"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = {}
    for name, source in {
        "jsonl": SourceConfig(path=str(tmp_path / "a.jsonl")),
        "tfds": SourceConfig(path="tfds:local_text/words", data_dir=data_dir),
    }.items():
        config = DataConfig(
            dir=str(tmp_path / name),
            tokenizer=str(tokenizer_dir),
            validation_fraction=0.2,
            domains=(DomainConfig(name="a", sources=(source,)),),
        )
        prepare(config, progress=lambda _: None)
        made[name] = {
            path.name: np.load(path) for path in sorted((tmp_path / name / "a").glob("*.npy"))
        }
    assert made["jsonl"].keys() == made["tfds"].keys() and len(made["tfds"]) == 6
    for name, array in made["jsonl"].items():
        np.testing.assert_array_equal(made["tfds"][name], array)
