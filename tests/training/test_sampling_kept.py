"""How a run samples is how it is evaluated, sampled from and exported."""

import contextlib
import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax import cli
from grpo_jax.config import MeshConfig, SamplingConfig, TrainConfig
from grpo_jax.parallel.agreement import Agreement
from grpo_jax.rewards.runner import RewardRunner
from grpo_jax.rollout import _complete, collect
from grpo_jax.rollout import generate as samplers
from grpo_jax.rollout.draw import policy_sampling
from grpo_jax.tasks import load_task, task_from_rows
from grpo_jax.training import _held_out, evaluate
from grpo_jax.training._policy import Policy
from grpo_jax.training.restore import Restored
from grpo_jax.weights.pretrained import _generation, save_pretrained

OWN = SamplingConfig(
    temperature=0.7, top_k=5, top_p=0.9, min_p=0.05, stop_ids=(7, 9, 11)
)
CUTS = SamplingConfig(top_p=0.5)  # the ends are the model's
LATER = ("eval", "sample")
EVERY = ("training", "evaluation", *LATER)


class Drawn(Exception):
    """Raised in place of sampling."""


@pytest.fixture
def drawn(tiny_policy, monkeypatch):
    """A function that says how each user of a run's policy samples."""
    seen = []

    def record(model, settings, **options):
        seen.append(settings.sampling)
        raise Drawn

    monkeypatch.setattr(_complete, "Engine", record)
    task = load_task("arithmetic")

    def sampling_of(user, sampling, *flags):
        config = TrainConfig(
            model=str(tiny_policy.folder), max_new_tokens=6, sampling=sampling
        )
        parts = {"model": tiny_policy.model, "tokenizer": tiny_policy.tokenizer}
        restored = Restored(params=tiny_policy.params, config=config, step=1, **parts)
        monkeypatch.setattr(
            "grpo_jax.training.restore.open_policy", lambda **asked: restored
        )
        mesh = evaluate.one_device()
        model = tiny_policy.model
        sampler = samplers.GroupSampler(model, mesh, max_prompt_tokens=64)
        sampler.update(tiny_policy.variables, version=0)
        with contextlib.suppress(Drawn):
            if user == "training":
                runner = RewardRunner((lambda **_: [],), config.rewards)
                rows = task_from_rows([{"prompt": "a"}], lambda **_: [])
                collect.Collector(
                    sampler, model.config, parts["tokenizer"], rows, runner, config
                ).sample(step=1, position=0)
            elif user == "evaluation":
                policy = Policy(params=None, config=config, **parts)
                small = dataclasses.replace(task, test=[task.test[0]])
                with RewardRunner(task.rewards, config.rewards) as runner:
                    _held_out.make_evaluation(
                        policy,
                        small,
                        small.test,
                        _held_out.encode_held_out(policy, small.test),
                        runner,
                        mesh,
                        sampler=sampler,
                        agreement=Agreement(),
                        announce=lambda text: None,
                    )()
            else:
                asked = {"sample": ["--prompt", "1+1="], "eval": ["--prompts", "1"]}
                cli._dispatch([user, "--run-dir", "unread", *asked[user], *flags])
        return seen.pop()

    return sampling_of


@pytest.mark.parametrize("sampling", [OWN, CUTS], ids=["own", "cuts"])
@pytest.mark.parametrize("user", EVERY)
def test_whoever_uses_a_run_draws_and_ends_as_it_does(
    drawn, tiny_policy, user, sampling
):
    expected = dataclasses.replace(
        sampling,
        temperature=sampling.temperature if user == "training" else 0.0,
        stop_ids=sampling.stop_ids or tiny_policy.tokenizer.stop_ids,
    )
    assert drawn(user, sampling) == expected


@pytest.mark.parametrize("user", LATER)
def test_one_sample_is_the_likeliest_and_several_are_drawn_as_in_the_run(drawn, user):
    assert drawn(user, OWN, "--samples", "3") == OWN
    asked = drawn(user, OWN, "--temperature", "0.2")
    assert asked == dataclasses.replace(OWN, temperature=0.2)


def test_a_stop_token_that_the_model_does_not_have_is_refused(drawn):
    beyond = SamplingConfig(stop_ids=(263, 264, 999))
    for user in EVERY:
        with pytest.raises(ValueError, match="stop_ids 264, 999: .* end at 263"):
            drawn(user, beyond)


@given(
    st.builds(
        SamplingConfig,
        temperature=st.floats(0.1, 3.0),
        top_k=st.none() | st.integers(1, 300),
        top_p=st.none() | st.floats(0.01, 1.0),
        min_p=st.none() | st.floats(0.01, 1.0),
        stop_ids=st.none() | st.lists(st.integers(0, 263), unique=True).map(tuple),
    )
)
def test_an_export_says_how_the_run_samples(tiny_policy, sampling):
    from transformers import GenerationConfig

    model, tokenizer = tiny_policy.model, tiny_policy.tokenizer
    settled = policy_sampling(model.config, tokenizer, sampling)
    written = GenerationConfig.from_dict(_generation(model.config, tokenizer, settled))
    assert written.do_sample and written.temperature == sampling.temperature
    assert written.eos_token_id == (list(settled.stop_ids) or None)
    # Off is 0 or 1 there: a key that is left out means a cut after 50 tokens.
    assert written.top_k == (sampling.top_k or 0)
    assert written.top_p == (sampling.top_p or 1.0)
    assert written.min_p == sampling.min_p


def test_every_export_of_a_run_says_so(tiny_policy, tmp_path, monkeypatch):
    config = TrainConfig(
        model=str(tiny_policy.folder), sampling=OWN, mesh=MeshConfig(fsdp=1)
    )
    parts = {"model": tiny_policy.model, "tokenizer": tiny_policy.tokenizer}
    restored = Restored(params=tiny_policy.params, config=config, step=1, **parts)
    monkeypatch.setattr(
        "grpo_jax.training.restore.open_policy", lambda **asked: restored
    )
    cli._dispatch(["export", "--run-dir", "unread", "--out", str(tmp_path / "one")])
    policy = Policy(params=tiny_policy.params, config=config, **parts)
    exported = policy.pretrained(tiny_policy.params)
    save_pretrained(tmp_path / "two", exported, sampling=policy.sampling)
    one, two = (
        json.loads((tmp_path / name / "generation_config.json").read_text())
        for name in ("one", "two")
    )
    assert one == two
    assert one["eos_token_id"] == [7, 9, 11] and one["top_p"] == 0.9
    # Without a run it is left to whoever loads the model.
    plain = json.loads((tiny_policy.folder / "generation_config.json").read_text())
    assert plain.keys() == {"bos_token_id", "eos_token_id", "pad_token_id"}
