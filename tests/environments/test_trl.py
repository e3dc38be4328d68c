"""TRL itself, where it is installed: its loop over tools, on the same turns as ours.

Needs trl and torch.
"""

import asyncio
import random
import sys
import threading
import types
from pathlib import Path

import pytest

from grpo_jax.config import EnvironmentsConfig
from grpo_jax.environments.host import Host

sys.path.append(str(Path(__file__).parent))
import environment_examples as examples
from environment_examples import call, says

pytestmark = [
    pytest.mark.parity,
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # torch and transformers have their own
]

PLAIN = [
    lambda draw: call("product", a=draw.randrange(9), b=2),
    lambda draw: call("product", a=3),
    lambda draw: call("product", a=3, c=4),
    lambda draw: call("table", rows=draw.randrange(3)),
    lambda draw: call("trouble", what="raise"),
    lambda draw: call("trouble", what="nothing"),
    lambda draw: call("unknown", x=1),
    lambda draw: call("add", step=draw.randrange(9)),
    lambda draw: {"type": "python", "name": "run"},
]
ASYNC = [lambda draw: call("later", a=draw.randrange(9))]
WRONG = [lambda draw: call("later")]
TOOLS = [examples.product, examples.later, examples.table, examples.trouble]


def script(seed):
    """The turns of one episode.

    In each all calls are plain, or async, or async and wrong: TRL gives the results of
    such kinds one after another, and we give all in the order of the calls.
    """
    draw = random.Random(seed)
    turns = []
    for _ in range(draw.randrange(4)):
        calls = draw.choice([PLAIN, PLAIN, ASYNC, WRONG])
        picked = [draw.choice(calls)(draw) for _ in range(draw.randrange(1, 4))]
        turns.append(says("", *picked))
    return [*turns, says("the end")]


def trls(monkeypatch, scripts, environments, most):
    """The conversations of TRL's loop, with what it counted."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    left = {index: iter(turns) for index, turns in enumerate(scripts)}

    def parse(tokenizer, ids, **_):
        return next(left[ids[0]])

    def generate(prompts, *_, **__):
        return [[ids[0]] for ids in prompts], None

    monkeypatch.setattr(trainer, "parse_response", parse)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    plain = [tool for tool in TOOLS if tool is not examples.later]
    model = types.SimpleNamespace(max_position_embeddings=10**6)
    self = types.SimpleNamespace(
        tools=TOOLS,
        max_tool_calling_iterations=most or sys.maxsize,
        max_completion_length=10**6,
        environment_factories=None,
        use_vllm=False,
        _is_vlm=False,
        _tokenizer=None,
        model=types.SimpleNamespace(config=model),
        async_loop=loop,
        _async_tool_dicts=[{"later": examples.later} for _ in scripts],
        _sync_tool_dicts=[
            {tool.__name__: tool for tool in [*plain, environment.add]}
            for environment in environments
        ],
        _get_tool_suffix_ids=lambda messages: [0],
        _generate_single_turn=generate,
    )
    for environment in environments:
        environment.reset()
    numbers = range(len(scripts))
    _, completions, _, _, calls, failures, _ = trainer.GRPOTrainer._tool_call_loop(
        self,
        [[] for _ in numbers],
        [[n] for n in numbers],
        [[n] for n in numbers],
        [[next(left[n])] for n in numbers],
        None,
        None,
        {},
    )
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    return completions, calls, failures


def ours(scripts, most):
    config = EnvironmentsConfig(max_tool_calling_iterations=most)
    completions = [[] for _ in scripts]
    with Host(TOOLS, examples.Count, config) as host:
        with host.play([{}], seeds=[0], members=len(scripts)) as play:
            left = dict(enumerate(map(iter, scripts)))
            while left:
                for number, turns in left.items():
                    completions[number].append(next(turns))
                    play.send(number, completions[number][-1])
                for number, reply in play.wait(list(left)).items():
                    completions[number] += reply.messages
                    if reply.done:
                        del left[number]
            found = play.results()
    calls, failures = sum(r.calls for r in found), sum(r.failed_calls for r in found)
    counts = [result.environment.count for result in found]
    return completions, calls, failures, counts


@pytest.mark.parametrize("most", [None, 1, 2])
def test_the_conversations_are_those_of_trls_loop(monkeypatch, most):
    scripts = [script(seed) for seed in range(60)]
    environments = [examples.Count() for _ in scripts]
    expected = trls(monkeypatch, scripts, environments, most)
    counts = [environment.count for environment in environments]
    found = ours(scripts, most)
    assert found[0] == expected[0]
    assert found[1:3] == expected[1:] and expected[2] > 10
    assert found[3] == counts and any(counts)
