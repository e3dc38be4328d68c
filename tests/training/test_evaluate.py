"""pass@k and majority by hand and by counting; accuracy of a model that copies."""

import dataclasses
import itertools
import json
import math
import types

import jax
import numpy as np
import pytest

from grpo_jax.config import RewardsConfig, SamplingConfig, TrainConfig
from grpo_jax.parallel.agreement import Agreement
from grpo_jax.rewards.runner import RewardRunner
from grpo_jax.rollout.generate import GroupSampler
from grpo_jax.tasks import load_task, task_from_rows
from grpo_jax.tasks.answers import last_answer, tagged_answer
from grpo_jax.tasks.base import Task
from grpo_jax.training._held_out import (
    complete_share,
    encode_held_out,
    held_out_values,
    make_evaluation,
)
from grpo_jax.training._judge import Completed, judge
from grpo_jax.training.evaluate import complete, evaluate, one_device
from grpo_jax.training.scores import Evaluation


def make_scores(correct, completions=None):
    correct = np.array(correct, bool)
    texts = completions or [["x"] * correct.shape[1]] * len(correct)
    return Evaluation(correct=correct, completions=texts)


def counted_pass_at(correct, k):
    """The share of all choices of k samples that hold a right one."""
    shares = [
        np.mean([any(chosen) for chosen in itertools.combinations(row, k)])
        for row in correct
    ]
    return np.mean(shares)


@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_counts_every_choice_of_k_samples(k):
    correct = np.random.default_rng(k).random((7, 6)) < 0.3
    given = make_scores(correct).pass_at(k)
    assert given == pytest.approx(counted_pass_at(correct, k))


def test_pass_at_one_is_the_accuracy_and_at_all_any_right_one():
    evaluation = make_scores([[1, 0, 0, 0], [0, 0, 0, 0]])
    assert evaluation.accuracy == 0.125 == evaluation.pass_at(1)
    assert evaluation.pass_at(4) == 0.5
    # 1 - C(3, 2) / C(4, 2) = 1/2 for the first prompt, 0 for the second.
    assert evaluation.pass_at(2) == 0.25


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_more_than_was_sampled_is_refused(k):
    with pytest.raises(ValueError, match=f"between 1 and 4 samples, got {k}"):
        make_scores([[1, 0, 0, 0]]).pass_at(k)


def test_the_majority_s_answer_decides():
    evaluation = make_scores(
        [[0, 1, 1], [1, 0, 0], [1, 0, 1], [0, 1, 0]],
        [["2", "3", " 3 "], ["1", "4", "4"], ["5", "6", "5"], ["7", "8", "9"]],
    )
    # Right, wrong, right; of answers given once each, the first: wrong.
    assert evaluation.majority() == 0.5


def test_completions_without_an_answer_do_not_vote():
    evaluation = dataclasses.replace(
        make_scores([[0, 0, 1], [0, 0, 0]]),
        answers=[[None, None, "3"], [None, None, None]],
    )
    assert evaluation.majority() == 0.5


def test_the_standard_error_is_over_prompts():
    evaluation = make_scores([[1, 1], [1, 0], [0, 0], [0, 0]])
    # Shares 1, 0.5, 0, 0: mean 0.375, variance 0.6875 / 3.
    assert evaluation.standard_error == pytest.approx(math.sqrt(0.6875 / 3 / 4))
    assert math.isnan(make_scores([[1, 0]]).standard_error)


def test_the_summary_has_powers_of_two_up_to_the_samples():
    summary = make_scores([[1, 0, 0, 0, 1, 0], [0] * 6]).summary()
    assert [
        name for name in summary if name.startswith("pass@") and "/" not in name
    ] == [
        "pass@1",
        "pass@2",
        "pass@4",
    ]
    assert summary["prompts"] == 2 and summary["samples"] == 6
    assert summary["majority@6"] == 0.5
    # Both prompts have pass@2 and a standard error of their mean: 1 - C(4, 2)/C(6, 2)
    # = 0.6 and 0, so sqrt(0.18 / 2) = 0.3.
    assert summary["pass@2/standard_error"] == pytest.approx(0.3)
    single = make_scores([[1], [0]]).summary()
    assert set(single) == {"prompts", "samples", "accuracy", "standard_error"}
    # One prompt has no standard error, and JSON no NaN.
    alone = make_scores([[1, 0]]).summary()
    assert alone["standard_error"] is None is alone["majority@2/standard_error"]
    json.dumps(alone, allow_nan=False)


def completed(*groups):
    return Completed(list(groups), [[[1]] * len(group) for group in groups])


def test_each_completion_is_judged_by_its_own_row():
    task = make_task("12")
    judged = judge(completed(["1", "2"], ["1", "2"]), task.test, task)
    np.testing.assert_array_equal(judged.correct, [[True, False], [False, True]])
    assert judged.lenient is None


def test_strict_and_lenient_readings_are_judged_apart():
    task = dataclasses.replace(
        load_task("arithmetic"), test=[{"prompt": "1+1=", "answer": "2"}]
    )
    texts = ["2", "It is 2.", "3", "3, or 2?", "no"]
    judged = judge(completed(texts), task.test, task)
    assert judged.correct.tolist() == [[True, False, False, False, False]]
    assert judged.lenient.correct.tolist() == [[True, True, False, True, False]]
    # Strictly each text is an answer of its own, the first of which is right; leniently
    # 2 has three votes.
    assert judged.majority() == 1.0 == judged.lenient.majority()
    assert judged.lenient.answers[0][4] is None
    assert judged.summary()["lenient"]["accuracy"] == 0.6
    assert list(judged.records(task.test))[1] == {
        "prompt": "1+1=",
        "completion": "It is 2.",
        "answer": "It is 2.",
        "correct": False,
        "lenient": {"answer": "2", "correct": True},
    }


TEXTS = [
    "Nf3",
    "Bf3",
    "3",
    "3.0",
    " 3",
    "so 3",
    "#### 3",
    "#### 3.",
    "#### 4",
    "",
    "\n",
]
TEXTS += [
    "<answer>3</answer>",
    "<answer> 3 </answer> 4",
    "answer: Nf3",
    "nf3.",
    "(1,2)",
    r"\boxed{3}",
    r"\boxed{3.0} 4",
]


@pytest.mark.parametrize("gold", ["3", "Nf3", "-3"])
@pytest.mark.parametrize(
    "kind", ["arithmetic", "gsm8k", "gsm8k:boxed", "rows", "reasoning_gym"]
)
def test_equal_votes_are_both_right_or_both_wrong(kind, gold, tmp_path):
    if kind == "reasoning_gym":
        pytest.importorskip("reasoning_gym")
    if kind in ("arithmetic", "reasoning_gym"):
        task = load_task("arithmetic" if kind == "arithmetic" else f"{kind}:chain_sum")
    else:
        line = {"prompt": "a", "question": "a", "answer": f"#### {gold}"}
        if kind == "rows":
            line["answer"] = gold
        elif gold == "Nf3":
            pytest.skip("its answers are numbers")
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps(line))
        name, data = (kind, str(file)) if kind != "rows" else (str(file), None)
        task = load_task(name, data=data)
    row = dict(task.train[0], answer=gold)
    judged = judge(completed(TEXTS), [row], task)
    for reading in (judged, judged.lenient):
        verdicts = {}
        for vote, right in zip(reading.answers[0], reading.correct[0], strict=True):
            assert verdicts.setdefault(vote, right) == right
        assert not verdicts.get(None, False)


def test_a_majority_does_not_merge_texts_that_hold_the_same_number(tmp_path):
    file = tmp_path / "moves.jsonl"
    file.write_text('{"prompt": "Your move?", "answer": "Nf3"}')
    task = load_task(str(file))
    judged = judge(completed(["Bf3", "Nf3", "nf3."]), task.train, task)
    assert judged.correct.tolist() == [[False, True, True]]
    assert judged.majority() == 1.0 == judged.lenient.majority()


def in_worker_of_evens(prompts, completions, answer, **columns):
    """1.0 for even numbers; a stand-in for a scorer that no comparison replaces."""
    return [float(int(text) % 2 == 0) for text in completions]


def test_a_verdict_judges_the_answers_where_comparing_cannot():
    task = make_task(
        "12",
        is_correct=None,
        answer=lambda text, row: tagged_answer(text),
        answer_lenient=lambda text, row: last_answer(text),
        verdict=in_worker_of_evens,
    )
    groups = ["<answer>4</answer>", "4"], ["<answer>3</answer>", "no answer: 8"]
    judged = judge(completed(*map(list, groups)), task.test, task)
    # Text without an answer never reaches the verdict, which would fail on it.
    assert judged.correct.tolist() == [[True, False], [False, False]]
    assert judged.lenient.correct.tolist() == [[True, True], [False, True]]


@pytest.fixture(scope="module")
def copier(tiny_policy):
    """Parameters with which the model repeats the last byte of its prompt for ever."""
    params = jax.tree.map(np.array, tiny_policy.params)
    # Layers add nothing to the embedding, which is nearest to itself.
    params["layers"]["attn"]["o"]["kernel"][:] = 0.0
    params["layers"]["mlp"]["down"]["kernel"][:] = 0.0
    params["final_norm"]["scale"][:] = 10.0
    table = np.random.default_rng(0).normal(size=(264, 32)).astype(np.float32)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    params["embed"]["embedding"] = table
    return jax.tree.map(jax.numpy.asarray, params)


def make_task(answers, **changes):
    rows = [
        {"prompt": f"q{c}", "answer": a}
        for c, a in zip("abcdef", answers, strict=False)
    ]
    fields = {
        "name": "copying",
        "train": rows,
        "test": rows,
        "rewards": (lambda completions, **_: [0.0] * len(completions),),
        "is_correct": lambda text, row: text == row["answer"],
    }
    return Task(**(fields | changes))


def test_greedy_accuracy_of_a_model_that_copies(tiny_policy, copier):
    task = make_task(["aaaa", "bbbb", "xxxx", "dddd", "eeee"])
    result = evaluate(
        tiny_policy.model, copier, tiny_policy.tokenizer, task, max_new_tokens=4
    )
    assert result.correct[:, 0].tolist() == [True, True, False, True, True]
    assert result.accuracy == 0.8
    assert result.completions[2] == ["cccc"]


def test_completions_that_the_limit_ended_are_marked(polite_policy):
    task = make_task(["!"] * 3)
    rows = [{"prompt": text, "answer": "!"} for text in ("a=", "b", "c=")]
    result = evaluate(
        polite_policy.model,
        polite_policy.params,
        polite_policy.tokenizer,
        dataclasses.replace(task, test=rows),
        max_new_tokens=4,
    )
    # It stops after "!", and never after another letter.
    assert result.cut.tolist() == [[False], [True], [False]]
    records = list(result.records(rows))
    assert [record["cut"] for record in records] == [False, True, False]
    assert records[1]["completion"] == "bbbb"
    assert result.summary()["completions/clipped_ratio"] == pytest.approx(1 / 3)


def test_the_size_of_batches_changes_no_completion(tiny_policy):
    rows = [{"prompt": f"q{c}"} for c in "abcde"]

    def texts(batch_size):
        sampler = GroupSampler(tiny_policy.model, one_device(), max_prompt_tokens=16)
        sampler.update(tiny_policy.variables, version=0)
        return complete_share(
            sampler,
            tiny_policy.tokenizer,
            [tiny_policy.tokenizer.encode_prompt(row["prompt"]) for row in rows],
            max_new_tokens=4,
            samples=2,
            sampling=SamplingConfig(stop_ids=()),
            batch_size=batch_size,
        )

    whole = texts(128)
    # Three batches of two prompts, the last of which is filled up; then one by one.
    for size in (4, 1):
        parts = texts(size)
        assert parts.ids == whole.ids and parts.texts == whole.texts
    assert len(whole.ids) == 5 and all(len(group) == 2 for group in whole.ids)
    assert len({tuple(one) for group in whole.ids for one in group}) == 10


def test_the_first_prompts_are_taken_and_samples_repeat_by_the_seed(tiny_policy):
    model, params, tokenizer = (
        tiny_policy.model,
        tiny_policy.params,
        tiny_policy.tokenizer,
    )
    task = make_task(["aaaa", "bbbb", "cccc"])
    options = {
        "prompts": 2,
        "samples": 3,
        "max_new_tokens": 4,
        "sampling": SamplingConfig(stop_ids=()),
    }
    given = [
        evaluate(model, params, tokenizer, task, seed=seed, **options)
        for seed in (0, 0, 1)
    ]
    assert given[0].correct.shape == (2, 3)
    assert given[0].completions == given[1].completions != given[2].completions


def test_prompts_without_a_task_may_fill_the_context_but_for_their_completions(
    tiny_policy, copier
):
    # 70 tokens are padded to no more than 128 - 50, not to the next power of two.
    texts = complete(
        tiny_policy.model,
        copier,
        tiny_policy.tokenizer,
        ["q" * 70, "qb"],
        max_new_tokens=50,
    )
    assert texts == [["q" * 50], ["b" * 50]]


@pytest.mark.parametrize("changes", [{"test": ()}, {"is_correct": None}])
def test_a_task_that_cannot_be_judged_is_refused(changes, tiny_policy):
    task = make_task(["a"], **changes)
    with pytest.raises(ValueError, match="task 'copying' has no held-out prompts"):
        evaluate(tiny_policy.model, {}, tiny_policy.tokenizer, task)


def lengths(completions, prompts, **_):
    """Rewards that differ, and none for the empty text."""
    return [len(text) / 7 if text else None for text in completions]


def test_rewards_of_held_out_rows_come_in_batches_as_their_completions_do():
    seen = []

    def count(completions, **_):
        seen.append(len(completions))
        return [float(text) for text in completions]

    rows = [{"prompt": "a"}] * 7
    completed = Completed(texts=[[str(n)] for n in range(7)], ids=[[[1]]] * 7)
    task = task_from_rows(rows, count, eval_rows=rows)
    with RewardRunner(task.rewards, RewardsConfig()) as runner:
        given = held_out_values(completed, rows, task, runner, 3)
    assert given == list(range(7)) and seen == [3, 3, 1]


@pytest.fixture
def evaluation(tiny_policy, fake_sampler):
    """What measures a policy whose completion of the row of a number is as long."""
    sampler = fake_sampler(lambda number, _: "x" * (number % 4))
    policy = types.SimpleNamespace(
        model=tiny_policy.model,
        tokenizer=tiny_policy.tokenizer,
        config=TrainConfig(model="tiny", eval_batch_size=8, max_new_tokens=8),
    )
    rows = [{"prompt": str(number)} for number in range(7)]

    def measure(seen, prompts, judged):
        def scores(completions, prompts, **_):
            seen.extend(prompts)
            return lengths(completions, prompts)

        def is_right(text, row):
            seen.append(row["prompt"])
            return len(text) == 2

        task = task_from_rows(rows, scores, eval_rows=rows[:prompts])
        if judged:
            task = dataclasses.replace(task, is_correct=is_right)
        with RewardRunner(task.rewards, RewardsConfig()) as runner:
            return make_evaluation(
                policy,
                task,
                task.test,
                encode_held_out(policy, task.test),
                runner,
                None,
                sampler=sampler,
                agreement=Agreement(),
                announce=lambda text: None,
            )()

    return measure


@pytest.mark.parametrize("judged", [False, True])
@pytest.mark.parametrize(("prompts", "count"), [(7, 3), (2, 4), (1, 2)])
def test_processes_score_each_held_out_row_once_and_agree(
    prompts, count, judged, evaluation, on_processes
):
    seen = []
    alone = evaluation(seen, prompts, judged)
    assert sorted(seen) == [str(number) for number in range(prompts)]
    seen.clear()
    together = on_processes(lambda _: evaluation(seen, prompts, judged), count)
    assert sorted(seen) == [str(number) for number in range(prompts)]
    for metrics in together:
        for name in metrics.keys() - {"time/eval"}:
            np.testing.assert_array_equal(metrics[name], alone[name])
