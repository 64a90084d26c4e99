"""How fast prompts are read and continued, beside transformers on the same CPU.

    python benchmarks/generate.py                          # a random Llama of 15 M parameters
    python benchmarks/generate.py --model DIR --markdown   # also a model of yours

Greedy, float32, with a cache of keys and values on both sides, torch on as many threads. Both have
to choose the same tokens before any time is taken. Then they take turns in one process; a ratio is
of neighbouring calls.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from losses import Options as LossOptions
from losses import num_threads, on_cpu, rendered, setting

from ddk_jax.models import hf
from ddk_jax.models.cache import Rows
from ddk_jax.models.decoder import Decoder
from ddk_jax.models.generate import generate, prefill
from ddk_jax.models.sampling import Sampling

WAYS = ("ours", "transformers")
SMALL: dict[str, Any] = {
    "vocab_size": 16_384,
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_hidden_layers": 8,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare generation on this CPU."""

    model: Path | None = None
    """Hugging Face directory of one model more."""
    batches: tuple[int, ...] = (1, 8)
    """Prompts at a time."""
    prompt: int = 128
    """Tokens of a prompt."""
    new: int = 64
    """Tokens to add to each."""
    repeats: int = 5
    """Timed calls of each way; they take turns."""
    json: Path | None = None
    """Write every single measurement to this file as well."""
    markdown: bool = False
    """Print the table in Markdown."""


class Prepared(NamedTuple):
    """A way that is ready to be timed."""

    read: Callable[[], object]
    """Reads the prompts."""
    generate: Callable[[], np.ndarray]
    """Reads and continues them: new tokens [B, N]."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model and one batch."""

    model: str
    batch: int
    prompt: int
    new: int
    read: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})
    """Seconds of every repetition, by way."""
    whole: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})
    """Likewise, of reading and continuing."""

    def read_speed(self, way: str) -> np.ndarray:
        """Tokens of prompts that are read in a second."""
        return self.batch * self.prompt / np.array(self.read[way])

    def new_speed(self, way: str) -> np.ndarray:
        """Tokens that are added in a second; the first comes with reading."""
        return self.batch * (self.new - 1) / (np.array(self.whole[way]) - np.array(self.read[way]))


def prepare_ours(directory: Path, prompts: np.ndarray, new: int) -> Prepared:
    """This package, compiled."""
    spec = hf.read_spec(directory)
    decoder, params = Decoder(spec=spec), hf.load(directory, spec=spec)
    B, P = prompts.shape
    rows = Rows(np.zeros(B, np.int32), np.full(B, P + new, np.int32))
    sampling = Sampling(max_new_tokens=new, temperature=0.0)
    tokens, listed, key = jax.device_put(prompts), prompts.tolist(), jax.random.key(0)

    def read() -> object:
        return jax.block_until_ready(prefill(decoder, params, tokens, rows, columns=P + new))

    def whole() -> np.ndarray:
        found = generate(decoder, params, listed, sampling, key=key)
        return np.asarray(found.tokens)[:, :new]

    return Prepared(read, whole)


def prepare_transformers(directory: Path, prompts: np.ndarray, new: int) -> Prepared:
    """Eager torch."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(num_threads())
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.from_numpy(prompts.astype(np.int64))
    ones = torch.ones_like(ids)

    def read() -> object:
        with torch.no_grad():
            return model(ids, attention_mask=ones, use_cache=True, logits_to_keep=1)

    def whole() -> np.ndarray:
        out = model.generate(
            ids, attention_mask=ones, max_new_tokens=new, min_new_tokens=new, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return out[:, ids.shape[1] :].numpy()

    return Prepared(read, whole)


def small_model(directory: Path) -> Path:
    """A random Llama, saved by transformers."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    model.save_pretrained(directory)
    return directory


def measure(name: str, directory: Path, batch: int, options: Options) -> Measured:
    """Check both ways against each other, then time them in turn.

    Raises:
      ValueError: they do not choose the same tokens.
    """
    size = hf.read_spec(directory).vocab_size
    shape = (batch, options.prompt)
    prompts = np.random.default_rng(0).integers(0, size, shape, dtype=np.int32)
    prepared = dict(
        zip(
            WAYS,
            (
                prepare(directory, prompts, options.new)
                for prepare in (prepare_ours, prepare_transformers)
            ),
            strict=True,
        )
    )
    chosen = [prepared[way].generate() for way in WAYS]
    if not np.array_equal(*chosen):
        raise ValueError(f"{name}: the ways do not choose the same tokens")
    found = Measured(model=name, batch=batch, prompt=options.prompt, new=options.new)
    for way in WAYS:
        prepared[way].read()
    for turn in range(options.repeats):
        for way in WAYS if turn % 2 else WAYS[::-1]:
            found.read[way].append(seconds(prepared[way].read))
            found.whole[way].append(seconds(prepared[way].generate))
    return found


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    result = call()
    took = time.perf_counter() - start
    del result  # before the next one begins
    return took


def measure_all(options: Options) -> Iterator[Measured]:
    """Every model and batch in turn."""
    with tempfile.TemporaryDirectory() as folder:
        models = {"15 M, random": small_model(Path(folder))}
        if options.model is not None:
            models[options.model.name] = options.model
        for name, directory in models.items():
            for batch in options.batches:
                yield measure(name, directory, batch, options)


def table(rows: list[Measured]) -> list[list[str]]:
    """Head and rows. Speeds are medians, ratios ours over theirs: above 1 we are faster."""
    head = ["model", "prompts"]
    for what in ("read", "new"):
        head += [f"{what} tokens/s, {way}" for way in WAYS] + [f"{what}, ratio"]
    found = [head]
    for row in rows:
        cells = [row.model, f"{row.batch} of {row.prompt}"]
        for speed in (row.read_speed, row.new_speed):
            cells += [f"{np.median(speed(way)):.0f}" for way in WAYS]
            low, middle, high = np.percentile(speed(WAYS[0]) / speed(WAYS[1]), [25, 50, 75])
            cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f})")
        found.append(cells)
    return found


def main(options: Options) -> None:
    """Measure, print, save.

    Raises:
      ValueError: the ways do not agree.
      ImportError: torch or transformers is not installed.
    """
    on_cpu()
    rows = []
    for row in measure_all(options):
        rows.append(row)
        print(f"{row.model}, {row.batch} prompts", file=sys.stderr)
    found = setting(LossOptions())
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    print("Ratios: ours over transformers, median of repetitions (first to third quartile).")
    print(rendered(table(rows), markdown=options.markdown))
    if options.json is not None:
        text = json.dumps({"setting": found, "rows": [vars(row) for row in rows]}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, ImportError) as error:
        sys.exit(str(error))
