"""The model card of an exported student: what it is, how good, from what text, how to load it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from ddk_jax import __version__
from ddk_jax.analysis.runs import RunRecord
from ddk_jax.analysis.tables import HEADER, domain_rows, row_cells
from ddk_jax.config import ASSETS, Config
from ddk_jax.data.shards import Manifest
from ddk_jax.models.spec import ModelSpec
from ddk_jax.plain import to_plain

FIGURE = "mixture.png"

_FRONT = {
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["ddk_jax", "distillation"],
}


def model_card(
    *,
    config: Config,
    step: int,
    spec: ModelSpec,
    manifest: Manifest,
    record: RunRecord,
    has_figure: bool,
) -> str:
    """The text of README.md, with the metadata that the Hugging Face hub reads.

    It names models and sources by the last part of their paths: a card is made to be published, the
    folders of the machine are not.

    Args:
      config: the run's.
      step: of the checkpoint that the student comes from.
      spec: the student's shape.
      manifest: of the prepared data.
      record: what the run measured.
      has_figure: whether `FIGURE` lies beside the card.
    """
    teachers = (config.teacher, *config.teacher.others) if config.teacher.path else ()
    teacher = " and ".join(model_name(teacher.path) for teacher in teachers)
    title = f"Student of {teacher}" if teacher else "Language model"
    made = f"distilled from {teacher}" if teacher else "trained on text alone"
    start = model_name(config.student.path) if config.student.path else "random values"
    figure = f"\n![Mixture weights over the training tokens]({FIGURE})\n" if has_figure else ""
    tokens = record.tokens[record.steps <= step]
    settings = {key: to_plain(config)[key] for key in ("objective", "mixture", "optim", "train")}
    return f"""---
{yaml.safe_dump(_FRONT, sort_keys=False)}---

# {title}

A {spec.family} model of {spec.num_parameters:,} parameters, {made} with ddk_jax
{__version__} (DDK, arXiv 2407.16154). It started from {start} and was trained on
{int(tokens[-1]) if len(tokens) else 0:,} tokens in {step:,} steps.

It continues text. It was not tuned to follow instructions, nor tested for safety.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/of/this/directory")
model = AutoModelForCausalLM.from_pretrained("path/of/this/directory")
```

## Results

Perplexity on validation text that no training row shares a document with, before and after
training; `ratio` is student over teacher, `weight` the last share of the data mixture.

{_table(HEADER, (row_cells(row) for row in domain_rows(record)))}
{figure}
## Data

{_table(("domain", "documents", "tokens", "sources", "licences"), _data_rows(manifest))}

## How it was made

`ddk train config.yaml`, config digest `{config.digest()}`, with these settings:

```yaml
{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}```
"""


def model_name(path: str) -> str:
    """What to call a model: from its place in the hub's cache, or the name of its directory."""
    if path.startswith(ASSETS):
        return f"the {path.removeprefix(ASSETS)} that ddk_jax ships"
    parts = Path(path).parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return f"{parts[-3].removeprefix('models--').replace('--', '/')} (revision {parts[-1]})"
    return parts[-1] if parts else path


def _data_rows(manifest: Manifest) -> Iterable[tuple[str, ...]]:
    for domain in manifest.domains:
        sources = ", ".join(dict.fromkeys(Path(source.path).name for source in domain.sources))
        licences = dict.fromkeys(source.licence or "not stated" for source in domain.sources)
        documents = domain.train.documents + domain.validation.documents
        tokens = domain.train.tokens + domain.validation.tokens
        yield domain.name, f"{documents:,}", f"{tokens:,}", sources, ", ".join(licences)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells)
