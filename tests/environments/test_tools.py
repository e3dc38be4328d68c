"""Tools: schemas, calls as the policy writes them, and what it reads of results."""

import functools
import sys
from pathlib import Path

import pytest
from transformers.utils import get_json_schema

from grpo_jax.environments import _tools

sys.path.append(str(Path(__file__).parent))
import environment_examples as examples


def test_a_schema_is_that_of_transformers():
    schema = _tools.json_schema(examples.product)
    assert schema == get_json_schema(examples.product)
    assert schema["function"]["parameters"]["required"] == ["a", "b"]
    # Of a method as well, without its `self`.
    method = _tools.json_schema(examples.Count().add)["function"]
    assert method["name"] == "add"
    assert list(method["parameters"]["properties"]) == ["step"]


def test_a_tool_that_cannot_be_described_is_refused_by_name():
    def silent(a: int):
        pass

    def untyped(a):
        """Do it.

        Args:
            a: It.
        """

    def undescribed(a: int):
        """Do it."""

    for tool in (silent, untyped, undescribed):
        with pytest.raises(ValueError, match=f"tool '{tool.__name__}' has no schema"):
            _tools.json_schema(tool)
    with pytest.raises(ValueError, match="must be a function or a method, got"):
        _tools.json_schema(functools.partial(examples.product, 1))


def test_calls_are_read_in_order_and_other_types_have_a_problem():
    other = {"type": "python", "name": "run"}
    message = examples.says("", examples.call("product", a=1), other)
    plain = {"function": {"name": "later"}}  # without type and arguments
    message["tool_calls"].append(plain)
    assert _tools.calls_of(message) == [
        _tools.Call("product", {"a": 1}),
        _tools.Call("run", {}, "Unsupported tool call type: python"),
        _tools.Call("later", {}),
    ]
    assert _tools.calls_of(examples.says("no call")) == []
    assert _tools.calls_of({"role": "assistant", "tool_calls": None}) == []


def test_results_are_texts_or_lists_as_in_trl():
    assert _tools.result_content(12) == "12"
    assert _tools.result_content({"a": 1}) == "{'a': 1}"
    assert _tools.result_content(None) == "None"
    assert _tools.result_content([(1, 2)]) == [(1, 2)]
    assert _tools.result_content([]) == []
    blocks = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert _tools.result_content(blocks) == "ab"
    with pytest.raises(ValueError, match="type image cannot be shown"):
        _tools.result_content([*blocks, {"type": "image", "image": 0}])
    assert _tools.error_text("it's") == "{'error': \"it's\"}"
