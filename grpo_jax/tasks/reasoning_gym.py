"""Procedurally generated reasoning problems from the reasoning-gym library.

Stojanovski et al. 2025, https://arxiv.org/abs/2505.24760; needs the extra `tasks`. Its
scorers evaluate what the model wrote, so they run in the isolated worker process only.
"""

import collections
import contextlib
import difflib
import functools
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from grpo_jax.tasks._numbers import number_text
from grpo_jax.tasks.answers import last_answer, parse_number, tagged_answer
from grpo_jax.tasks.base import Task, completion_text, per_completion

TRAIN_ROWS = 2000
TEST_ROWS = 200
INSTRUCTION = "Give the final answer between <answer> and </answer>."
# Problem i of a data set is made from its seed + i, so run s takes the seeds from
# (s + 1) * TRAIN_ROWS on and shares none with another run or the held-out problems.
# Some data sets take seeds of 32 bits only; runs 1,000,000 seeds apart are alike.
_DISTINCT_SEEDS = 1_000_000
# Scores are floats between 0 and 1; this much below 1 is rounding.
_FULL_SCORE = 0.999
# Problems whose scorer is tried out when a task is loaded, and what is right for none.
_PROBED = 3
_NONSENSE = "certainly nothing"
_LOG = logging.getLogger(__name__)


def reasoning_gym_task(dataset: str, *, seed: int) -> Task:
    """Returns the data set of that name; problems are made when they are read.

    The seed decides the training problems; the held-out ones are the same for every
    seed. In data sets with few distinct problems the two can coincide. If several
    answers can be right, `is_correct` is None and `verdict` judges: only the isolated
    scorer can then decide.
    """
    library = _library()
    known = library.factory.DATASETS
    if dataset not in known:
        near = difflib.get_close_matches(dataset, known, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"reasoning_gym has no data set {dataset!r}.{hint} It has {len(known)}: "
            f"{', '.join(sorted(known))}."
        )
    # Whether the library compares the answer as a text with the one right answer.
    scorer = known[dataset][0].score_answer
    compares = scorer is library.dataset.ProceduralDataset.score_answer
    train_seed = (seed % _DISTINCT_SEEDS + 1) * TRAIN_ROWS
    _probe(dataset, train_seed)
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


@per_completion
def answer_score(
    prompts: list,
    completions: list,
    dataset: list[str],
    dataset_seed: list[int],
    index: list[int],
    **columns: Any,
) -> list[float]:
    """1.0 where the library gives the tagged answer its full score, else 0.0.

    Partial credit counts as 0. Most of the library's scorers give some to any text that
    contains the answer, and a little to every text; a policy learns to exploit that.
    Run it in the isolated worker: scorers of several data sets evaluate the answer,
    and a short one can keep them busy for ever.
    """
    answers = [tagged_answer(completion_text(text)) for text in completions]
    return _scores(answers, dataset, dataset_seed, index)


@per_completion
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


def library_score(
    answer: str | None, *, dataset: str, dataset_seed: int, index: int
) -> float:
    """The library's score of an answer to one of its problems, from 0.0 to 1.0.

    The score of no answer is 0.0, and so is that of one on which the scorer raises.
    Scores within rounding of 1.0 are 1.0. Run it where a scorer may hang.
    """
    scorer = _dataset(dataset, dataset_seed)
    return _score(scorer, answer, _entry(dataset, dataset_seed, index))


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


def _is_right(scorer: Any, answer: str, entry: Mapping[str, Any]) -> bool:
    return _score(scorer, answer, entry) == 1.0


def _score(scorer: Any, answer: str | None, entry: Mapping[str, Any]) -> float:
    if answer is None:
        return 0.0
    try:
        score = float(scorer.score_answer(answer, entry))
    except MemoryError:
        raise
    except Exception:
        # The library's scorers parse what the model wrote, and some raise, with any
        # exception, on text they cannot parse: such an answer is wrong.
        return 0.0
    return 1.0 if score >= _FULL_SCORE else max(score, 0.0)


def _probe(dataset: str, seed: int) -> None:
    """Tries the scorer on right and wrong answers to the first problems.

    Warns of each kind of wrong answer that is right for every problem.

    Raises:
      ValueError: if the problems cannot be made, if nonsense is right, or if the right
        answer is not. Then nothing could be learned.
    """
    library = f"reasoning_gym {version('reasoning_gym')}"
    try:
        scorer = _dataset(dataset, seed)
        entries = [_entry(dataset, seed, index) for index in range(_PROBED)]
    except Exception as error:
        raise ValueError(
            f"{library} cannot make problems of {dataset!r} without options: {error}."
        ) from error
    verdicts = collections.defaultdict(list)
    with _prints_aside():
        fault = next(_faults(scorer, entries), None)
        for entry in entries:
            for kind, wrong in _wrong_answers(entry, entries):
                verdicts[kind].append(_is_right(scorer, wrong, entry))
    if fault is not None:
        raise ValueError(
            f"the scorer of {dataset!r} in {library} takes {fault}: nothing can be "
            "learned from it; choose another data set."
        )
    for kind, right in verdicts.items():
        if all(right):
            _LOG.warning(
                "the scorer of %r in %s takes %s for right: a policy may learn that",
                *(dataset, library, kind),
            )


def _faults(scorer: Any, entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the scorer takes an answer for, where that makes learning impossible."""
    for entry in entries:
        gold = entry["answer"]
        if _is_right(scorer, _NONSENSE, entry):
            yield f"{_NONSENSE!r} for right"
        elif gold is not None and not _is_right(scorer, str(gold), entry):
            yield f"its own answer {str(gold)[:80]!r} for wrong"


def _wrong_answers(
    entry: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, str]]:
    """Answers to a problem that should be wrong, with their kinds."""
    gold = str(entry["answer"])
    number = parse_number(gold)
    if number:
        yield "a number with the wrong sign", number_text(-number)
        yield "0 where the answer is another number", "0"
    others = {str(e["answer"]) for e in entries if e["answer"] is not None} - {gold}
    for other in sorted(others):
        yield "the answers of other problems", other


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
    with _prints_aside():
        return _dataset(name, seed)[index]


def _prints_aside() -> contextlib.redirect_stdout:
    # Some data sets print as they make or score problems, and `eval` writes JSON there.
    return contextlib.redirect_stdout(sys.stderr)


def _library() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError(
            "reasoning_gym tasks need the reasoning-gym library: "
            "pip install 'grpo-jax[tasks]'."
        ) from error
    return reasoning_gym
