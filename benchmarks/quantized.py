"""What a base in 8 or 4 bits costs a language model: the likelihood of solutions.

    python benchmarks/quantized.py MODEL --data DIR [--rows 64]

The model reads problems of GSM8K with their solutions. Per base it gives the loss,
which is the mean negative log-likelihood of a token, and how far single
log-probabilities are from those of the first base. Nothing is trained: adapters begin
as zeros, so this is what the first step of a run starts from.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import tyro
from workloads import own_versions, publish, show, surroundings

from grpo_jax import load_pretrained, load_task
from grpo_jax.models.quantized import QUANTIZED
from grpo_jax.training.step import policy_logprobs
from grpo_jax.weights.tokenizer import Tokenizer

BASES = "float32", "bfloat16", "int8", "nf4"
# Longer prompts and solutions are left out, so that programs have one shape.
PROMPT, SOLUTION = 192, 256
AT_ONCE = 4


def main(
    model: tyro.conf.Positional[str],
    *,
    data: str,
    rows: int = 64,
    bases: tuple[str, ...] = BASES,
    out: Path | None = Path("benchmarks/results/quantized.jsonl"),
) -> None:
    """Measure each base; the last line is JSON.

    Args:
      model: its folder or GGUF file.
      data: the folder with GSM8K, train.jsonl and test.jsonl.
      rows: problems that are read.
      bases: what the kernels of layers are stored in; the first one is compared with.
      out: a file to which the line is appended.
    """
    found, tokens = {}, 0
    first: list[np.ndarray] = []
    for base in bases:
        logp = read(model, base, data, rows)
        first = first or logp
        moved = [own - other for own, other in zip(logp, first, strict=True)]
        tokens = sum(map(len, logp))
        # Of the mean over tokens, for rows that are drawn at random.
        rest = [np.sum(row - np.mean(np.concatenate(moved))) for row in moved]
        found[base] = {
            "loss": -np.concatenate(logp).mean(dtype=float),
            "more than the first": -np.concatenate(moved).mean(dtype=float),
            "standard error of that": float(np.linalg.norm(rest)) / tokens,
            "rms of a token's difference": np.concatenate(moved).std(dtype=float),
        }
    name = Path(model).name
    show(f"{name}, {rows} solutions, {tokens} tokens", found)
    line = {
        "benchmark": "quantized",
        "model": name,
        "sizes": [rows, tokens],
        "rows": found,
        "versions": own_versions(),
        **surroundings(),
    }
    publish(line, out)


def read(model: str, base: str, data: str, rows: int) -> list[np.ndarray]:
    """The log-probabilities of the tokens of each solution, in float32."""

    def dtype(path: str) -> str:
        return base if QUANTIZED.fullmatch(path) else "float32"

    loaded = load_pretrained(model, dtype=dtype)

    @jax.jit
    def score(params, prompts, lengths, solutions):
        variables = {"params": params}
        given = policy_logprobs(
            loaded.model, variables, prompts, lengths, solutions, temperature=1.0
        )
        return given.logp

    pairs = tokenized(loaded.tokenizer, data)[:rows]
    found = []
    for start in range(0, rows, AT_ONCE):
        part = pairs[start : start + AT_ONCE]
        prompts, lengths = padded([prompt for prompt, _ in part], PROMPT)
        solutions, ends = padded([solution for _, solution in part], SOLUTION)
        logp = score(loaded.params, prompts, lengths, solutions[:, None])
        found += [row[0, :end] for row, end in zip(np.asarray(logp), ends, strict=True)]
    return found


def tokenized(tokenizer: Tokenizer, data: str) -> list[tuple[list[int], list[int]]]:
    """Prompts with the solutions that people wrote, those that are short enough."""
    asked = load_task("gsm8k", data=data).test
    lines = Path(data, "test.jsonl").read_text().splitlines()
    pairs = [
        (
            tokenizer.encode_prompt(row["prompt"]),
            tokenizer.encode_rendered(json.loads(line)["answer"]),
        )
        for row, line in zip(asked, lines, strict=True)
    ]
    return [
        pair for pair in pairs if len(pair[0]) <= PROMPT and len(pair[1]) <= SOLUTION
    ]


def padded(rows: Sequence[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [N, width], padded on the right, and how many of them are real [N]."""
    ids = np.zeros((len(rows), width), np.int32)
    for own, row in zip(ids, rows, strict=True):
        own[: len(row)] = row
    return ids, np.asarray([len(row) for row in rows], np.int32)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
