"""Procedurally generated reasoning problems from the reasoning-gym library.

Stojanovski et al. 2025, https://arxiv.org/abs/2505.24760; needs the extra `tasks`. Its
scorers evaluate what the model wrote, so they run in the isolated worker process only.
"""

import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax.tasks.answers import last_answer, tagged_answer
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
    seed. In data sets with few distinct problems the two can coincide. Where several
    answers are right, only the isolated scorer can tell: `is_correct` is then None and
    `verdict` judges.
    """
    known = _library().factory.DATASETS
    if dataset not in known:
        near = difflib.get_close_matches(dataset, known, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"reasoning_gym has no data set {dataset!r}.{hint} It has {len(known)}: "
            f"{', '.join(sorted(known))}."
        )
    compares = _compares(dataset)
    train_seed = (seed % _DISTINCT_SEEDS + 1) * TRAIN_ROWS
    return Task(
        name=f"reasoning_gym:{dataset}",
        train=_GeneratedRows(dataset, train_seed, TRAIN_ROWS),
        test=_GeneratedRows(dataset, 0, TEST_ROWS),
        rewards=(answer_score,),
        is_correct=_is_correct if compares else None,
        is_correct_lenient=_is_correct_lenient if compares else None,
        answer=lambda text, row: tagged_answer(text),
        answer_lenient=lambda text, row: last_answer(text),
        verdict=None if compares else answer_verdict,
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
    answers = [tagged_answer(completion_text(text)) for text in completions]
    return _scores(answers, dataset, dataset_seed, index)


def answer_verdict(
    prompts: list,
    completions: list,
    dataset: list[str],
    dataset_seed: list[int],
    index: list[int],
    **columns: Any,
) -> list[float]:
    """`answer_score` of answers that stand alone, without tags around them."""
    answers = [completion_text(text) for text in completions]
    return _scores(answers, dataset, dataset_seed, index)


def _scores(
    answers: Sequence[str | None],
    datasets: Sequence[str],
    seeds: Sequence[int],
    indices: Sequence[int],
) -> list[float]:
    scores = []
    for answer, name, seed, index in zip(
        answers, datasets, seeds, indices, strict=True
    ):
        scorer, entry = _dataset(name, seed), _entry(name, seed, index)
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


def _compares(dataset: str) -> bool:
    """Whether the library judges this data set by comparing texts."""
    base = _library().dataset.ProceduralDataset
    kind = _library().factory.DATASETS[dataset][0]
    return kind.score_answer is base.score_answer


def _is_correct(completion: str, row: Mapping[str, Any]) -> bool:
    return tagged_answer(completion) == row["answer"]


def _is_correct_lenient(completion: str, row: Mapping[str, Any]) -> bool:
    return last_answer(completion) == row["answer"]


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
        raise ValueError(
            "reasoning_gym tasks need the reasoning-gym library: "
            "pip install 'grpo-jax[tasks]'."
        ) from error
    return reasoning_gym
