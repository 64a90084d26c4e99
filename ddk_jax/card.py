"""The model card of an exported student: what it is, how good, from what text, how to load it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ddk_jax import __version__
from ddk_jax.analysis.runs import RunRecord
from ddk_jax.analysis.tables import HEADER, domain_rows, row_cells
from ddk_jax.config import Config
from ddk_jax.data.shards import Manifest
from ddk_jax.models.decoder import num_parameters
from ddk_jax.models.spec import ModelSpec
from ddk_jax.places import ASSETS
from ddk_jax.plain import to_plain

FIGURE = "mixture.png"

# As the hub spells them.
_LICENCES = (
    "apache-2.0 bsd-2-clause bsd-3-clause cc cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-nc-4.0 "
    "cc-by-nc-sa-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 gpl-3.0 mit mpl-2.0 odbl odc-by pddl "
    "unlicense"
).split()


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
    commits = record.identity.get("models", {})
    names = {
        m.path: model_name(m.path, commits.get(m.path, "")) for m in (*teachers, config.student)
    }
    teacher = " and ".join(names[teacher.path] for teacher in teachers)
    title = " and ".join(names[teacher.path].partition(" (")[0] for teacher in teachers)
    title = f"Student of {title}" if teacher else "Language model"
    made = f"distilled from {teacher}" if teacher else "trained on text alone"
    start = names[config.student.path] if config.student.path else "random values"
    figure = f"\n![Mixture weights over the training tokens]({FIGURE})\n" if has_figure else ""
    tokens = record.tokens[record.steps <= step]
    settings = {key: to_plain(config)[key] for key in ("objective", "mixture", "optim", "train")}
    return f"""---
{yaml.safe_dump(_front(config, manifest, commits), sort_keys=False)}---

# {title}

A {spec.family} model of {num_parameters(spec):,} parameters, {made} with ddk_jax
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


def model_name(path: str, commit: str = "") -> str:
    """What to call a model: its id on the hub with the commit, or the name of its directory.

    Args:
      path: as the config names it.
      commit: of a hub repository, as the run has recorded it.
    """
    if path.startswith(ASSETS):
        return f"the {path.removeprefix(ASSETS)} that ddk_jax ships"
    repo, commit = _repository(path, commit)
    if repo:
        return f"{repo} (commit {commit})"
    return Path(path).name or path


def _repository(path: str, commit: str) -> tuple[str, str]:
    """Hub id and commit of a model; empty for one that is not from the hub."""
    if commit:
        return path, commit
    parts = Path(path).parts  # perhaps a snapshot in the hub's cache
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/"), parts[-1]
    return "", ""


def _front(config: Config, manifest: Manifest, commits: Mapping[str, str]) -> dict[str, Any]:
    """What the hub reads of the card."""
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ddk_jax", "distillation"],
    }
    sources = [source for domain in manifest.domains for source in domain.sources]
    if len(licences := {source.licence for source in sources}) == 1 and all(licences):
        (licence,) = licences
        known = licence.lower().replace(" ", "-")
        front["license"] = known if known in _LICENCES else "other"
        front |= {} if known in _LICENCES else {"license_name": licence}
    path = config.student.path
    if path and (base := _repository(path, commits.get(path, ""))[0]):
        front |= {"base_model": base, "base_model_relation": "finetune"}
    return front


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
