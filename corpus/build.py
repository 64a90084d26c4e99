"""Build a corpus: ten domains of which a subset is shipped, with their tokenizer, or all.

    bash corpus/fetch.sh WORKDIR
    python corpus/build.py WORKDIR OUT --full       # OUT/<domain>.jsonl, to train the teacher on
    python corpus/build.py WORKDIR OUT --assets     # ddk_jax/assets/{corpus,tokenizer}

    bash corpus/fetch.sh WORKDIR --all
    python corpus/build.py WORKDIR corpus/full --all [--only a,b] [--cap-mb 20]

The first two write JSON lines {"text", "source"}. The shipped subset is the head of the same seeded
shuffle that the full-size domain is written in, so every shipped document is in the full-size
domain, byte for byte. `--all` writes twenty-four other domains (configs/corpus24.yaml), not
filtered by licence: {"text", "source", "domain", "split"}. The same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import everything
from cleaning import Document, NearDuplicates, acceptable, cut, normalise
from provenance import write_licences, write_readme
from readers.maths import missing_packages
from sources import DOMAINS, notices, strip_header
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

FULL_BYTES = 8_000_000
SHIPPED_BYTES = 800_000
TOKENIZER_BYTES = 2_000_000
"""Text per domain that the tokenizer is trained on: equal amounts where there is enough."""
VOCABULARY = 4_096
END_OF_TEXT = "<|endoftext|>"
ASSETS = Path(__file__).resolve().parents[1] / "ddk_jax/assets"


def read_domain(domain: str, work: Path) -> list[Document]:
    """Return the documents of one domain: cleaned, cut, shuffled, without near-duplicates."""
    pieces = [
        Document(source, piece)
        for source, text in DOMAINS[domain](work)
        for piece in cut(normalise(strip_header(domain, text)))
        if acceptable(piece)
    ]
    random.Random(f"ddk {domain}").shuffle(pieces)  # noqa: S311 (not for security)
    seen = NearDuplicates()
    return head((piece for piece in pieces if seen.is_new(piece.text)), FULL_BYTES)


def head(documents: Iterable[Document], limit: int) -> list[Document]:
    """Return the first documents, as many as fit into `limit` bytes of text."""
    taken = []
    size = 0
    for document in documents:
        size += len(document.text.encode())
        if size > limit:
            break
        taken.append(document)
    return taken


def to_lines(documents: Sequence[Document]) -> bytes:
    """Return the documents as JSON lines in UTF-8."""
    rows = ({"text": d.text, "source": d.source} for d in documents)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def train_tokenizer(corpus: dict[str, list[Document]], folder: Path) -> None:
    """Train the byte-level BPE tokenizer on equal parts of all domains and write it.

    Digits are single tokens, so that numbers of any length are spelt the same way.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=16,  # no token for a ruler line
        show_progress=False,
    )
    sample = (d.text for documents in corpus.values() for d in head(documents, TOKENIZER_BYTES))
    tokenizer.train_from_iterator(sample, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    config = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    for name, content in (("tokenizer_config", config), ("special_tokens_map", special)):
        text = json.dumps(content, indent=2, sort_keys=True)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def write_shipped(corpus: dict[str, list[Document]], work: Path, folder: Path) -> None:
    """Write the shipped subset and the copyright notices of the files it was taken from."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain, documents in corpus.items():
        shipped = head(documents, SHIPPED_BYTES)
        packed = lzma.compress(to_lines(shipped), preset=9 | lzma.PRESET_EXTREME)
        (folder / f"{domain}.jsonl.xz").write_bytes(packed)
        if domain not in ("code_cpp", "code_go", "math_proofs"):
            continue  # the other sources state their rights once, for the whole package
        used = {d.source for d in shipped}
        lines = {n for s, text in DOMAINS[domain](work) if s in used for n in notices(text)}
        target = folder / "LICENSES" / domain / "NOTICES.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(sorted(lines)) + "\n", encoding="utf-8")


def write_all(work: Path, out: Path, domains: Sequence[str], cap_bytes: float) -> None:
    """Write some of the twenty-four domains.

    Raises:
        FileNotFoundError: A package was not fetched.
        ModuleNotFoundError: A package that makes a domain is not installed.
    """
    for domain in domains:
        documents = everything.DOMAINS[domain](work)
        done = everything.write_domain(domain, documents, out, cap_bytes)
        print(
            f"{domain:16s} {done.size / 1e6:6.2f} MB {done.documents:6d} of {done.found} documents;"
            f" dropped: {done.short} short, {done.copies} copies, {done.undecodable} not UTF-8",
            flush=True,
        )


def parsed() -> argparse.Namespace:
    """Read the command line; `domains` are the chosen ones of the twenty-four."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("work", type=Path, help="folder that fetch.sh filled")
    parser.add_argument("out", type=Path, help="where --full and --all write <domain>.jsonl")
    parser.add_argument("--full", action="store_true", help="write the full-size domains")
    parser.add_argument("--assets", action="store_true", help="write what the package ships")
    parser.add_argument("--all", action="store_true", help="write all twenty-four domains")
    parser.add_argument("--only", help="of --all: these domains, with commas between them")
    parser.add_argument("--cap-mb", type=float, default=20, help="of --all: MB of a domain at most")
    arguments = parser.parse_args()
    if arguments.all and (arguments.full or arguments.assets):
        parser.error("--all goes without --full and --assets")
    if arguments.only and not arguments.all:
        parser.error("--only goes with --all")
    arguments.domains = arguments.only.split(",") if arguments.only else list(everything.DOMAINS)
    if unknown := [name for name in arguments.domains if name not in everything.DOMAINS]:
        parser.error(f"no domain {', '.join(unknown)}; there are {', '.join(everything.DOMAINS)}")
    if arguments.all and "math_qa" in arguments.domains and (missing := missing_packages()):
        parser.error(f"the domain math_qa needs packages: pip install {' '.join(missing)}")
    return arguments


def main() -> None:
    """Run the command line."""
    arguments = parsed()
    if arguments.all:
        if "math_qa" in arguments.domains and os.environ.get("PYTHONHASHSEED") != "0":
            # Sets of names order the questions, so that the same bytes need the same hashes.
            environment = {**os.environ, "PYTHONHASHSEED": "0"}
            os.execve(sys.executable, sys.orig_argv, environment)  # noqa: S606 (itself)
        try:
            write_all(arguments.work, arguments.out, arguments.domains, arguments.cap_mb * 1e6)
        except FileNotFoundError as error:
            sys.exit(f"error: {error}")
        return
    corpus = {}
    for domain in DOMAINS:
        corpus[domain] = documents = read_domain(domain, arguments.work)
        size = sum(len(d.text.encode()) for d in documents)
        print(f"{domain:14s} {size / 1e6:6.2f} MB {len(documents):6d} documents", flush=True)
        if arguments.full:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / f"{domain}.jsonl").write_bytes(to_lines(documents))
    if arguments.assets:
        write_shipped(corpus, arguments.work, ASSETS / "corpus")
        write_licences(arguments.work, ASSETS / "corpus")
        write_readme(arguments.work, ASSETS / "corpus")
        train_tokenizer(corpus, ASSETS / "tokenizer")


if __name__ == "__main__":
    main()
