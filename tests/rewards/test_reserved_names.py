"""Names under which a reward function may log, and those which the run keeps."""

import sys
from pathlib import Path

import pytest

from grpo_jax.config import RewardsConfig
from grpo_jax.rewards._convention import RECORD_FIELDS, RESERVED_METRICS
from grpo_jax.rewards.runner import RewardRunner

sys.path.append(str(Path(__file__).parent))
import reward_functions as fns


def score(function, **config):
    with RewardRunner([function], RewardsConfig(**config)) as runner:
        return runner.score(["p"], ["a"], {}, completion_ids=[[1]], step=1)


@pytest.mark.parametrize("on_error", ["raise", "drop"])
@pytest.mark.parametrize("name", sorted(RESERVED_METRICS))
def test_a_metric_of_the_run_is_refused_by_name(name, on_error):
    name += "rollout" if name.endswith("/") else ""

    def logs(completions, log_metric):
        log_metric(name, 1.0)
        return [0.0]

    with pytest.raises(ValueError, match=rf"'logs' called log_metric\('{name}'\)"):
        score(logs, on_error=on_error)


@pytest.mark.parametrize("name", sorted(RECORD_FIELDS))
def test_a_field_of_a_completion_s_record_is_refused_by_name(name):
    async def logs(completions, log_extra):
        log_extra(name, ["x"])
        return [0.0]

    with pytest.raises(ValueError, match=rf"'logs' called log_extra\('{name}'\)"):
        score(logs)


@pytest.mark.parametrize("name", ["accuracy", "my/reward", "rewards", "time", "kl/x"])
def test_any_other_name_is_the_function_s_own(name):
    def logs(completions, log_metric, log_extra):
        log_metric(name, 1.0)
        log_extra(f"parsed {name}", ["x"])
        return [0.0]

    scores = score(logs)
    assert fns.metrics(scores)[name] == 1.0
    assert scores.extra == {f"parsed {name}": ["x"]}


@pytest.mark.parametrize("name", [5, None, ["a"], ("a",)])
@pytest.mark.parametrize("logger", ["log_metric", "log_extra"])
def test_a_name_that_is_no_text_is_refused(logger, name):
    def logs(completions, log_metric, log_extra):
        {"log_metric": log_metric, "log_extra": log_extra}[logger](name, [1.0])
        return [0.0]

    with pytest.raises(ValueError, match=f"'logs' called {logger}.*must be a string"):
        score(logs)
