"""Conversations in ids: episodes that are watched, and a person who takes part."""

import types

import numpy as np
import pytest

from grpo_jax.config import SamplingConfig, TrainConfig
from grpo_jax.environments.base import Step, TextEnvironment
from grpo_jax.environments.outcome import Reply
from grpo_jax.reporting.text import readable_text
from grpo_jax.rollout.generate import GroupSampler
from grpo_jax.training import conversation
from grpo_jax.training.conversation import converse, play_episode
from grpo_jax.training.restore import Restored

GREEDY = SamplingConfig(temperature=0.0)


class Steps(TextEnvironment):
    """Shows its seed and then numbers; the policy is right if it says "!"."""

    def reset(self, *, seed, last=3, **row):
        self.number, self.last = 0, last
        return f"{seed % 7}="

    def step(self, text):
        self.number += 1
        done = self.number == self.last
        return Step(f"{self.number}=", float(text == "!"), done)


@pytest.fixture(scope="module")
def policy(polite_policy):
    return Restored(
        params=polite_policy.params,
        model=polite_policy.model,
        config=TrainConfig(),
        tokenizer=polite_policy.tokenizer,
        step=None,
    )


@pytest.fixture
def drawn(monkeypatch):
    """The prompt and the completion of each call of the sampler, as ids."""
    calls, real = [], GroupSampler.sample

    def sample(self, prompts, **options):
        done = real(self, prompts, **options)
        ids = np.asarray(done.tokens)[0, 0, : int(done.lengths[0, 0])].tolist()
        calls.append((list(prompts[0]), ids, np.asarray(done.mask)[0, 0]))
        return done

    monkeypatch.setattr(GroupSampler, "sample", sample)
    return calls


def play(policy, row=None, *, limit=60, seed=0, factory=Steps):
    shown = []
    rewards = play_episode(
        policy,
        {"prompt": [{"role": "user", "content": "Go "}], **(row or {})},
        environment_factory=factory,
        sampling=GREEDY,
        max_new_tokens=limit,
        seed=seed,
        show=lambda messages: shown.append(readable_text(messages)),
    )
    return rewards, shown


def test_an_episode_is_shown_from_its_opening_to_its_last_turn(policy, drawn):
    rewards, shown = play(policy)
    assert rewards == {"Steps": 3.0}
    opening, *rest = shown
    assert opening.startswith("user: Go ") and opening.endswith("=")
    turns = ["assistant: !", "user: 1=", "assistant: !", "user: 2=", "assistant: !"]
    assert rest == turns
    # What was shown is what was drawn, answers masked.
    (_, ids, mask), end = drawn[0], policy.tokenizer.stop_ids[0]
    encode = policy.tokenizer.encode_prompt
    turn = [*encode("!"), end]
    assert ids == [*turn, *encode("1="), *turn, *encode("2="), *turn]
    assert mask[: len(ids)].tolist() == [1, 1, 0, 0, 1, 1, 0, 0, 1, 1]


def test_the_seed_and_the_row_make_the_episode(policy):
    openings = {play(policy, {"last": 1}, seed=seed)[1][0] for seed in range(4)}
    assert len(openings) > 1
    assert play(policy, {"last": 1}, seed=2) == play(policy, {"last": 1}, seed=2)
    assert len(play(policy, {"last": 1})[1]) == 2


def test_an_answer_without_room_is_told_and_ends_the_episode(policy):
    rewards, shown = play(policy, limit=6)
    # Two tokens drawn, two given, two drawn: the next two would leave no room.
    assert [text.partition(":")[0] for text in shown[1:4]] == [
        "assistant",
        "user",
        "assistant",
    ]
    assert shown[-1].startswith("(the answer to this turn does not fit")
    assert rewards == {"Steps": 2.0}


def test_an_environment_that_fails_gives_no_reward(policy):
    class Broken(Steps):
        def step(self, text):
            raise RuntimeError("gone")

    rewards, shown = play(policy, factory=Broken)
    assert rewards is None and shown[-1] == "assistant: !"


def talk(policy, lines, **options):
    shown, lines = [], iter(lines)
    converse(
        policy,
        lambda: next(lines, None),
        sampling=GREEDY,
        show=lambda messages: shown.append(readable_text(messages)),
        **options,
    )
    return shown


def test_a_person_talks_in_exact_ids_until_the_end_of_the_input(policy, drawn):
    assert talk(policy, ["a=", "b=", "cd="]) == ["assistant: !"] * 3
    ((prompt, ids, mask),) = drawn  # one conversation: nothing is computed twice
    encode, end = policy.tokenizer.encode_prompt, policy.tokenizer.stop_ids[0]
    turn = [*encode("!"), end]
    assert prompt == encode("a=")
    assert ids == [*turn, *encode("b="), *turn, *encode("cd="), *turn]
    assert mask[: len(ids)].tolist() == [1, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1]


def test_nothing_is_drawn_for_nobody(policy, drawn):
    assert talk(policy, []) == [] and drawn == []


def test_a_conversation_that_is_full_ends_and_says_so(policy):
    shown = talk(policy, ["a=", "b=", "c="], max_new_tokens=5)
    assert shown == ["assistant: !"] * 2 + ["(the conversation has reached 5 tokens)"]
    # A turn that does not end fills it, too.
    cut = talk(policy, ["a"], max_new_tokens=5)
    assert cut == ["assistant: aaaaa", "(the conversation has reached 5 tokens)"]


def test_a_turn_that_cannot_be_encoded_is_asked_for_again(policy):
    shown = talk(policy, ["x" * 500, "\ud83d=", "a=", "\ud83d=", "b="])
    assert "tokens, more than the" in shown[0] and "surrogate" in shown[1]
    assert shown[2] == "assistant: !" == shown[4] and "surrogate" in shown[3]
    assert len(shown) == 5


class Chat:
    """Turns are texts of ids; one that begins with 7 calls a tool."""

    def message(self, ids):
        calls = [{"function": {"name": "f", "arguments": {}}}] * (ids[0] == 7)
        return {"role": "assistant", "content": str(ids), "tool_calls": calls}

    def suffix(self, ids, messages):
        return [len(message["content"]) for message in messages]


class Host:
    """Plays that answer each call, of which `rounds` are allowed."""

    def __init__(self, rounds):
        self.rounds, self.plays = rounds, []

    def play(self, rows, **options):
        play = types.SimpleNamespace(sent=[], closed=0, results=lambda: [])
        replies = iter(range(self.rounds))
        play.send = lambda number, message: play.sent.append(message)
        play.wait = lambda numbers: {0: reply()}

        def reply():
            if next(replies, None) is None:
                return Reply(done=True)
            return Reply(messages=({"role": "tool", "name": "f", "content": "abc"},))

        def close():
            play.closed += 1

        play.close = close
        self.plays.append(play)
        return play


def test_calls_are_answered_by_tools_and_all_else_by_the_person():
    host, lines, shown = Host(2), iter(["hello", None]), []
    show = lambda messages: shown.append(readable_text(messages))  # noqa: E731
    one = conversation._Talk(
        Chat(), host, lambda: next(lines), show, limit=99, stops=[9]
    )
    ids, answers = [], []
    for turn in ([7, 9], [7, 9], [1, 9], [7, 9], [2, 9]):
        ids += turn
        one.ended(0, 0, list(ids))
        (answer,) = one.answers(wait=True)
        answers.append(answer.tokens)
        ids += answer.tokens or []
    # Two calls, the person, a call of another play, the end of the input.
    assert answers == [[3], [3], [5], [3], None]
    assert [len(play.sent) for play in host.plays] == [2, 1]
    assert [play.closed for play in host.plays] == [1, 1]
    # Each turn is read without what stood before it.
    assert shown[0] == "assistant: [7, 9]\nassistant calls: f()"
    assert shown[1] == "tool f: abc" and shown[4] == "assistant: [1, 9]"
    assert one.answers(wait=True) == []


def test_after_the_last_call_that_is_allowed_the_person_speaks():
    host, lines = Host(1), iter(["hello"])
    one = conversation._Talk(
        Chat(), host, lambda: next(lines), lambda messages: None, limit=99, stops=[9]
    )
    given = []
    for turn in ([7, 9], [7, 9, 3, 7, 9]):
        one.ended(0, 0, turn)
        given += [answer.tokens for answer in one.answers(wait=False)]
    assert given == [[3], [5]] and host.plays[0].closed == 1
