"""What a host is made of: contracts read, and refused with what to do."""

import sys
from pathlib import Path

import pytest

from grpo_jax.config import EnvironmentsConfig
from grpo_jax.environments.base import Step, TextEnvironment
from grpo_jax.environments.host import Host

sys.path.append(str(Path(__file__).parent))
import environment_examples as examples


def names(schemas):
    return [schema["function"]["name"] for schema in schemas]


def test_each_row_has_the_tools_of_its_environment_and_those_of_the_run():
    factories = {"count": examples.Count, "door": examples.Door, "echo": examples.Echo}
    with Host([examples.product], factories) as host:
        of = {
            name: names(host.schemas({"environment": name}))
            for name in ("count", "echo")
        }
        of["door"] = names(host.schemas({"environment": "door", "word": "w"}))
        assert host.tools == ("product", "add", "dream", "say", "trouble")
        assert host.reward_names == ("Count", "Echo")
    assert of == {
        "count": ["product", "add"],
        "door": ["product", "dream", "say", "trouble"],
        "echo": ["product"],  # `step` and `close` of a text environment are none
    }


def test_one_environment_needs_no_column():
    with Host(environment_factory=examples.Count) as host:
        assert names(host.schemas({"prompt": "p", "environment": "mine"})) == ["add"]
    with Host([examples.product]) as host:
        assert names(host.schemas({"prompt": "p"})) == ["product"]
        assert host.reward_names == ()


def test_a_factory_may_be_a_function_and_share_a_class():
    class Half(examples.Count):
        pass

    half = Half
    factories = {"a": lambda: examples.Count(), "b": examples.Count, "c": half}
    with Host(environment_factory=factories) as host:
        assert host.reward_names == ("Count", "Half")
        rows = [{"environment": name} for name in "abc"]
        with host.play(rows, seeds=[0, 1, 2], members=1) as play:
            scored = [result.rewards for result in play.results()]
    # A reward belongs to its class exactly: the others have none of it.
    given = [[name for name, value in row.items() if value == value] for row in scored]
    assert given == [["Count"], ["Count"], ["Half"]]


def test_a_public_close_is_a_tool_as_in_trl():
    class Shop:
        def reset(self, **row):
            return None

        def close(self) -> str:
            """Close the shop."""
            return "closed"

        @staticmethod
        def open_hours() -> str:
            """Tell the hours."""
            return "9 to 5"

    with Host(environment_factory=Shop) as host:
        assert names(host.schemas({})) == ["close", "open_hours"]
        with host.play([{}], seeds=[0], members=1) as play:
            play.send(0, examples.says("", examples.call("open_hours")))
            assert examples.results(play.wait([0])[0]) == ["9 to 5"]


def test_rows_that_do_not_fit_are_refused_before_anything_runs():
    with Host(environment_factory={"door": examples.Door}) as host:
        for row in ({}, {"environment": "window"}):
            with pytest.raises(ValueError, match="expected one of 'door'"):
                host.schemas(row)
        with pytest.raises(ValueError, match="Door needs 'word'"):
            host.play([{"environment": "door"}], seeds=[0], members=1)
        with pytest.raises(ValueError, match="got 1 rows, 2 seeds and 1 members"):
            host.play([{"environment": "door", "word": "w"}], seeds=[0, 1], members=1)

    class Narrow:
        def reset(self, prompt):
            pass

    with Host(environment_factory=Narrow) as host:
        assert host.schemas({"prompt": "p"}) == []
        with pytest.raises(ValueError, match=r"Narrow cannot take 'answer'.*\*\*row"):
            host.schemas({"prompt": "p", "answer": 3})


def test_what_cannot_be_played_is_refused_at_once():
    class Resetless:
        def act(self):
            pass

    def broken():
        raise OSError("no server")

    class Heirless:  # of TextEnvironment
        def reset(self, **row):
            pass

        def step(self, text):
            pass

    class Needy:
        def reset(self, **row):
            pass

        def get_reward(self, answer):
            pass

    class Twice(examples.Count):
        def product(self) -> int:
            """Be called as another tool is."""
            return 0

    refused = {
        "give tools, an environment_factory, or both": ((), None),
        "has no method `reset`": ((), Resetless),
        "Heirless has a method `step`.*inherit from .*TextEnvironment": ((), Heirless),
        "Needy.get_reward must need no arguments.*'answer'": ((), Needy),
        "(?s)environment 'x'.*no server": ((), {"x": broken}),
        "Twice has two tools named 'product'": ([examples.product], Twice),
        "two tools named 'product'": ([examples.product, examples.product], None),
        "must be a function or a method": ([examples.Count()], None),
    }
    for message, (tools, factory) in refused.items():
        with pytest.raises(ValueError, match=message):
            Host(tools, factory)


def test_reward_functions_can_ask_for_environments_unless_they_are_elsewhere():
    def asks(completions, environments):
        return []

    def takes_all(completions, **kwargs):
        return []

    with Host([examples.product]) as host:
        host.check_rewards([asks, takes_all])
    with Host([examples.product], config=EnvironmentsConfig(isolate=True)) as host:
        host.check_rewards([takes_all])
        with pytest.raises(ValueError, match="takes `environments`.*isolate to False"):
            host.check_rewards([asks])


def test_text_environments_are_closed_with_the_host_and_others_are_not():
    closed = []

    class Text(TextEnvironment):
        async def reset(self, *, seed, **row):
            return None

        async def step(self, text):
            return Step(text)

        async def close(self):
            closed.append(self)

    class Other:
        def reset(self, **row):
            pass

        def close(self) -> None:
            """Close it, as a tool."""
            closed.append(self)

    with Host(environment_factory={"text": Text, "other": Other}) as host:
        rows = [{"environment": "text"}, {"environment": "other"}]
        play = host.play(rows, seeds=[0, 1], members=2)
        first = [result.environment for result in play.results()]
        play.close()
        # Instances are made once: those of the last play are reset for the next.
        with host.play(rows, seeds=[2, 3], members=2) as play:
            second = [result.environment for result in play.results()]
        assert set(map(id, first)) == set(map(id, second))
        assert not closed
    assert sorted(map(id, closed)) == sorted(map(id, first[:2]))


def test_what_makes_no_environments_and_a_tool_in_no_list_are_refused():
    config = EnvironmentsConfig()
    with pytest.raises(ValueError, match="environment_factory must be a class"):
        Host(environment_factory=examples.Count(), config=config)
    with pytest.raises(ValueError, match="environment 'a' must be a class"):
        Host(environment_factory={"a": 3}, config=config)
    with pytest.raises(ValueError, match="tools must be a list of functions"):
        Host(examples.product, config=config)


def test_a_tool_without_a_schema_is_refused_in_one_line():
    def bare(a):
        return a

    with pytest.raises(ValueError, match=r"^tools: ValueError: tool 'bare'") as caught:
        Host([bare])
    assert "\n" not in str(caught.value)


def test_a_row_names_its_environment_by_a_text():
    with Host(environment_factory={"a": examples.Count}) as host:
        with pytest.raises(ValueError, match=r"the environment \['a'\]; expected one"):
            host.schemas({"environment": ["a"]})
