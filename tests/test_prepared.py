"""What `ddk inspect` says of prepared data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import write_tokenizer

from ddk_jax.config import DataConfig, DomainConfig, FilterConfig, SharedSourceConfig, SourceConfig
from ddk_jax.data.prepare import prepare
from ddk_jax.errors import DataError
from ddk_jax.prepared import describe_data


def test_a_description_has_counts_lengths_overlap_samples_and_licences(tmp_path: Path) -> None:
    text = "the same sentence in every document of this domain, and number"
    rows = [{"text": f"{text} {i}", "set": "ab"[i % 2], "n": i} for i in range(60)]
    rows += [{"text": "x", "set": "c", "n": 1}, {"text": 5, "set": "a", "n": 1}, rows[0]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    short = FilterConfig(field="n", test="at_most", value=49)
    source = SourceConfig(path=str(tmp_path / "rows.jsonl"), licence="CC0-1.0", filters=(short,))
    config = DataConfig(
        dir=str(tmp_path / "data"),
        tokenizer=str(write_tokenizer(tmp_path / "tokenizer")),
        validation_fraction=0.2,
        max_rejected_fraction=0.1,
        domains=(DomainConfig(name="one", max_documents=20), DomainConfig(name="two")),
        shared=(SharedSourceConfig(source=source, field="set", domains={"a": "one", "b": "two"}),),
    )
    manifest = prepare(config, progress=lambda _: None)
    said = describe_data(tmp_path / "data")
    lines = {line.split()[0]: line for line in said.splitlines() if line}
    tables = said.split("\n\n")
    assert "257 tokens" in tables[0] and "20.0% of the documents" in tables[0]
    total = sum(domain.train.documents for domain in manifest.domains)
    last = tables[1].splitlines()[-1].split()
    assert last[:2] == ["total", str(total)]
    assert 0.95 < float(last[-1]) < 1.0  # a token is a byte, and there are end tokens
    assert "100%" in tables[2] and "median" in tables[2]
    row = next(line for line in tables[3].splitlines() if line.startswith("one"))
    assert row.split() == ["one", "1", "1", "5", "5", "0"]
    assert f"{tmp_path}/rows.jsonl: 1 rows of no domain" in tables[3]
    assert "near-duplicates of training documents" in tables[4]
    assert "one: the same sentence" in tables[5]
    assert lines["two:"].endswith("(CC0-1.0)")


def test_damaged_data_is_not_described(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prepared data"):
        describe_data(tmp_path)
