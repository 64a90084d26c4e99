"""JSON lines as a data set in the format of TensorFlow Datasets, without TensorFlow.

    python corpus/as_tfds.py FOLDER DATA_DIR

Every `<domain>.jsonl` of FOLDER becomes a configuration of the data set `local_text` in DATA_DIR,
in ArrayRecord files. `ddk prepare` reads it as a source with the path `tfds:local_text/<domain>`
and that `data_dir`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds


def builder_of(folder: Path) -> type[tfds.core.GeneratorBasedBuilder]:
    """A builder with a configuration for each file of `folder`."""

    class LocalText(tfds.core.GeneratorBasedBuilder):
        """Text by domain."""

        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS's interface)
            tfds.core.BuilderConfig(name=path.stem) for path in sorted(folder.glob("*.jsonl"))
        ]

        def _info(self) -> tfds.core.DatasetInfo:
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, download: Any) -> dict[str, Any]:
            del download
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
            path = folder / f"{self.builder_config.name}.jsonl"
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines):
                    yield number, {"text": json.loads(line)["text"]}

    return LocalText


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="with <domain>.jsonl files")
    parser.add_argument("data_dir", type=Path, help="where the data set is written")
    arguments = parser.parse_args()
    kind = builder_of(arguments.folder)
    for config in kind.BUILDER_CONFIGS:
        builder = kind(config=config.name, data_dir=arguments.data_dir, file_format="array_record")
        builder.download_and_prepare()
        print(f"{config.name}: {builder.info.splits['train'].num_examples:,} documents", flush=True)


if __name__ == "__main__":
    main()
