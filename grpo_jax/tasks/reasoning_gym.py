"""Procedurally generated reasoning problems from the reasoning-gym library.

Stojanovski et al. 2025, https://arxiv.org/abs/2505.24760; needs the extra `tasks`. Its
scorers evaluate what the model wrote, so they run in the isolated worker process only.
"""

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_jax.tasks.answers import tagged_answer
from grpo_jax.tasks.base import Task, completion_text

TRAIN_ROWS = 2000
TEST_ROWS = 200
INSTRUCTION = "Give the final answer between <answer> and </answer>."
# Problem i of a data set is made from its seed + i, so run s takes the seeds from
# (s + 1) * TRAIN_ROWS on and shares none with another run or the held-out problems.
# Some data sets take seeds of 32 bits only; runs 1,000,000 seeds apart are alike.
_DISTINCT_SEEDS = 1_000_000
# Scores are floats between 0 and 1; this much below 1 is rounding.
_FULL_SCORE = 0.999


def reasoning_gym_task(dataset: str, *, seed: int) -> Task:
    """Returns the data set of that name; its problems are made when they are asked for.

    The seed decides the training problems; the held-out ones are the same for every
    seed. In data sets with few distinct problems the two can coincide. `is_correct` is
    None where several answers are right and only the isolated scorer can tell.
    """
    known = _library().factory.DATASETS
    if dataset not in known:
        near = difflib.get_close_matches(dataset, known, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"reasoning_gym has no data set {dataset!r}.{hint} It has {len(known)}: "
            f"{', '.join(sorted(known))}."
        )
    train_seed = (seed % _DISTINCT_SEEDS + 1) * TRAIN_ROWS
    return Task(
        name=f"reasoning_gym:{dataset}",
        train=_GeneratedRows(dataset, train_seed, TRAIN_ROWS),
        test=_GeneratedRows(dataset, 0, TEST_ROWS),
        rewards=(answer_score,),
        is_correct=_exact_test(dataset),
        isolate=True,
    )


def answer_score(
    prompts: list,
    completions: list,
    dataset: list[str],
    dataset_seed: list[int],
    index: list[int],
    **columns: Any,
) -> list[float]:
    """1.0 where the library gives the tagged answer its full score, else 0.0.

    Partial credit is not passed on: most of the library's scorers give some to any text
    that contains the answer, and a little to every text, which a policy learns to farm.
    Run it in the isolated worker: scorers of several data sets evaluate the answer,
    and `9**9**9**9` as an answer to a countdown keeps one busy for ever.
    """
    scores = []
    for number, completion in enumerate(completions):
        answer = tagged_answer(completion_text(completion))
        entry = _entry(dataset[number], dataset_seed[number], index[number])
        scorer = _dataset(dataset[number], dataset_seed[number])
        scores.append(float(answer is not None and _is_right(scorer, answer, entry)))
    return scores


def _is_right(scorer: Any, answer: str, entry: dict[str, Any]) -> bool:
    try:
        return scorer.score_answer(answer, entry) >= _FULL_SCORE
    except MemoryError:
        raise
    except Exception:
        # The library's scorers parse what the model wrote, and some raise, with any
        # exception, on text they cannot parse: such an answer is wrong.
        return False


class _GeneratedRows(Sequence[Mapping[str, Any]]):
    """Rows that the library makes on demand; row i is always the same."""

    def __init__(self, dataset: str, seed: int, size: int) -> None:
        self._dataset, self._seed, self._size = dataset, seed, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self._size))]
        number = range(self._size)[index]  # negative indices and IndexError as in lists
        entry = _entry(self._dataset, self._seed, number)
        content = f"{entry['question']}\n\n{INSTRUCTION}"
        return {
            "prompt": [{"role": "user", "content": content}],
            "answer": str(entry["answer"]),
            "dataset": self._dataset,
            "dataset_seed": self._seed,
            "index": number,
        }


def _exact_test(dataset: str) -> Callable[[str, Mapping[str, Any]], bool] | None:
    """A test of correctness by comparison, where the library compares too."""
    base = _library().dataset.ProceduralDataset
    kind = _library().factory.DATASETS[dataset][0]
    return _is_correct if kind.score_answer is base.score_answer else None


def _is_correct(completion: str, row: Mapping[str, Any]) -> bool:
    return tagged_answer(completion) == row["answer"]


@functools.cache
def _dataset(name: str, seed: int) -> Any:
    return _library().create_dataset(name, size=TRAIN_ROWS, seed=seed)


# The completions of a group share their problem, and some take a second to make.
@functools.lru_cache(maxsize=4096)
def _entry(name: str, seed: int, index: int) -> dict[str, Any]:
    return _dataset(name, seed)[index]


def _library() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(
            "reasoning_gym tasks need the reasoning-gym library: "
            "pip install 'grpo-jax[tasks]'."
        ) from error
    return reasoning_gym
