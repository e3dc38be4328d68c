"""TRL itself, where it is installed: its rewards, and what our page says about it.

Needs trl and math-verify.
"""

import inspect
import pathlib
import re

import numpy as np
import pytest

from grpo_jax.config import RewardsConfig
from grpo_jax.rewards.runner import RewardRunner

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "trl.md"
PROMPTS = [[{"role": "user", "content": "What is 2+2?"}]] * 5
TEXTS = [
    "<think>2+2</think>\\boxed{4}",
    "<think>2+2</think>\\boxed{5}",
    "\\boxed{4}",
    "4 4 4 4",
    "",
]
SOLUTIONS = ["$4$", "$4$", "$4$", "$4$", "not a number"]
IDS = [[1, 2, 3, 4, 5], [1, 2, 1, 2, 1, 2], list(range(90)), [4, 4, 4, 4], [2]]

pytestmark = [
    pytest.mark.parity,
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # torch and transformers have their own
]


@pytest.fixture(scope="module")
def functions():
    pytest.importorskip("math_verify")
    rewards = pytest.importorskip("trl.rewards")
    return [
        rewards.accuracy_reward,
        rewards.reasoning_accuracy_reward,
        rewards.think_format_reward,
        rewards.get_cosine_scaled_reward(max_len=100),
        rewards.get_repetition_penalty_reward(ngram_size=2),
        rewards.get_soft_overlong_punishment(
            max_completion_len=100, soft_punish_cache=20
        ),
    ]


@pytest.mark.parametrize("isolate", [False, True], ids=["here", "in the worker"])
def test_its_reward_functions_give_what_they_give_in_trl(functions, isolate):
    with RewardRunner(functions, RewardsConfig(isolate=isolate)) as runner:
        scores = runner.score(
            PROMPTS, TEXTS, {"solution": SOLUTIONS}, completion_ids=IDS, step=1
        )
    messages = [[{"role": "assistant", "content": text}] for text in TEXTS]
    given = {
        "prompts": PROMPTS,
        "completions": messages,
        "completion_ids": IDS,
        "solution": SOLUTIONS,
    }
    for function, rewards in zip(functions, scores.rewards, strict=True):
        expected = [np.nan if r is None else r for r in function(**given)]
        np.testing.assert_array_equal(rewards, expected)
        assert len(set(rewards)) > 1, function
    assert "gold_parsed" in scores.extra


def first_column(heading):
    """Names in code in the first column of the table below a heading."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1]
    rows = re.findall(r"^\| ([^|]*) \|", section.split("\n## ")[0], re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([\w/<>]+)", row)}


def test_options_on_the_page_are_those_of_trl():
    trl = pytest.importorskip("trl")
    # An argument of the trainer, and the value of an option.
    names = first_column("Options") - {"peft_config", "token_truncate"}
    assert len(names) > 40
    assert names <= trl.GRPOConfig.__dataclass_fields__.keys()
    assert "peft_config" in inspect.signature(trl.GRPOTrainer).parameters


def test_metrics_on_the_page_are_those_of_trl():
    trl = pytest.importorskip("trl")
    source = inspect.getsource(inspect.getmodule(trl.GRPOTrainer))
    # Logged by the trainer that it extends; made from a name; with a prefix in front.
    elsewhere = {"loss", "grad_norm", "learning_rate", "eval_reward"}
    names = first_column("Metrics") - elsewhere
    assert len(names) > 12
    for name in names:
        assert f'"{name.replace("<name>", "{reward_func_name}")}"' in source, name
