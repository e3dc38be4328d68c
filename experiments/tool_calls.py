"""A tool learned by a language model: problems in words, with a calculator.

    python experiments/get_model.py qwen2.5-coder-0.5b
    python experiments/tool_calls.py \\
        --model models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf

The chat template of this model asks for calls in <tool_call> tags, which the model
cannot write: its calls are bare JSON. So the first step writes a folder with a template
that asks for these, and with a `response_template` that reads them. Finished parts are
kept; after an interruption the same command goes on.

Hardware: 2 CPU cores and 14 GiB. Time: 6 minutes before, then 17 minutes a seed.
Result with seeds 0 and 1, in greedy answers to 50 held-out problems: accuracy 36 % ->
100 and 98 %, calls per completion 0.68 -> 1.00. Without the tool it is 0 %, before and
after. A line for each seed is in results.jsonl.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

import grpo_jax
from grpo_jax.config.files import to_json_line
from grpo_jax.tasks.answers import last_number

# Where a template of Qwen2.5 speaks of tags.
TAGS = {
    " within <tool_call></tool_call> XML tags:\\n<tool_call>\\n": ":\\n",
    "<args-json-object>}\\n</tool_call>": "<args-json-object>}",
    '\'\\n<tool_call>\\n{"name": "\'': '\'\\n{"name": "\'',
    "'}\\n</tool_call>'": "'}'",
}
# A call is a whole turn, sometimes fenced as code. In the terms of transformers.
CALLS = {
    "open_pattern": r"^\s*(?:```json\s*)?\{\s*"
    r'"name":\s*"(?P<name>[^"\\]+)",\s*"arguments":\s*',
    "close_pattern": r"\}\s*(?:```\s*)?<\|im_end\|>",
    "content": "json",
    "transform": {
        "type": "function",
        "function": {"name": "{name}", "arguments": "{content}"},
    },
    "repeats": True,
}
READER = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {"tool_calls": CALLS, "content": {"close": "<|im_end|>"}},
}

QUESTIONS = (
    "A box holds {b} nails. How many nails are in {a} boxes?",
    "A ticket costs {b} dollars. How much do {a} tickets cost?",
    "A train covers {a} miles a day. How far does it go in {b} days?",
)
CALL = {"name": "multiply", "arguments": {"a": 12, "b": 34}}
EXAMPLE = (
    {"role": "user", "content": "What is 12 * 34?"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]},
    {"role": "tool", "name": "multiply", "content": "408"},
    {"role": "assistant", "content": "12 * 34 is 408."},
)


def multiply(a: int, b: int) -> str:
    """Multiplies two whole numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return str(a * b)


def right(completions, answer, **columns):
    """1 if the last number of the last message is the answer, else 0."""
    texts = [messages[-1]["content"] for messages in completions]
    return [float(is_right(text, a)) for text, a in zip(texts, answer, strict=True)]


def is_right(text: str, answer: str) -> bool:
    """Whether the last number of a text is the answer."""
    return last_number(text) == int(answer)


@dataclass(frozen=True)
class Options:
    """The options."""

    model: str  # a folder or a GGUF file of Qwen2.5
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 8
    prompts_per_step: int = 2
    group_size: int = 8
    learning_rate: float = 2e-4
    prompts: int = 50  # held-out questions
    runs: Path = Path("runs/tool_calls")


def problems(*, example: bool = True) -> grpo_jax.Task:
    """Products of four and three digits in words, behind an example of a call."""
    draw = random.Random(0)
    rows = []
    for _ in range(1000):
        a, b = draw.randrange(1000, 10_000), draw.randrange(100, 1000)
        question = draw.choice(QUESTIONS).format(a=a, b=b)
        asked = [{"role": "user", "content": question}]
        prompt = [*EXAMPLE, *asked] if example else asked
        rows.append({"prompt": prompt, "answer": str(a * b)})
    return grpo_jax.Task(
        name="products",
        train=rows[200:],
        test=rows[:200],
        rewards=(right,),
        is_correct=lambda text, row: is_right(text, row["answer"]),
    )


def with_bare_calls(model: str, out: Path) -> None:
    """Write the model with a template and a reader of calls in bare JSON."""
    policy = grpo_jax.load_pretrained(model)
    template = policy.tokenizer.chat_template(with_tools=True)
    for tags, bare in TAGS.items():
        if tags not in template:
            raise SystemExit(f"the chat template of {model} has no {tags!r}.")
        template = template.replace(tags, bare)
    part = out.with_name(f"{out.name}.part")  # until it is whole
    grpo_jax.save_pretrained(part, policy)
    (part / "chat_template.jinja").write_text(template)
    path = part / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"response_template": READER}
    path.write_text(json.dumps(settings, indent=2))
    part.rename(out)


def main(options: Options) -> None:
    """Measure the model with and without the tool, train it, measure it again."""
    start = options.runs / "model"
    if not start.is_dir():
        with_bare_calls(options.model, start)
    before = measure(options, "before", lambda: grpo_jax.load_pretrained(str(start)))
    for seed in options.seeds:
        name, config = f"after-{seed}", configure(options, seed, start)
        if (options.runs / f"{name}.json").is_file():
            continue
        run = grpo_jax.train(
            config, dataset=problems().train, rewards=right, tools=[multiply]
        )
        if run.summary["status"] != "finished":
            return  # it was asked to stop
        after = measure(options, name, lambda run=run: grpo_jax.restore(run.run_dir))
        line = to_json_line({"seed": seed, "before": before, "after": after})
        with (options.runs / "results.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def configure(options: Options, seed: int, model: Path) -> grpo_jax.TrainConfig:
    """The run of a seed."""
    return grpo_jax.TrainConfig(
        model=str(model),
        seed=seed,
        run_dir=str(options.runs / f"seed-{seed}"),
        steps=options.steps,
        prompts_per_step=options.prompts_per_step,
        group_size=options.group_size,
        max_new_tokens=96,
        eval_every=0,
        eval_prompts=0,
        objective=grpo_jax.ObjectiveConfig(kl_coef=0.0),
        optimizer=grpo_jax.OptimizerConfig(learning_rate=options.learning_rate),
        lora=grpo_jax.LoraConfig(rank=16),
        checkpoint=grpo_jax.CheckpointConfig(every=2),
    )


def measure(options: Options, name: str, source: Callable[[], Any]) -> dict[str, Any]:
    """Greedy accuracy with the tool and without it; completions in a file beside it."""
    path = options.runs / f"{name}.json"
    if path.is_file():
        return json.loads(path.read_text())
    policy, found = source(), {}
    for kind, tools in ("with", [multiply]), ("without", None):
        task = problems(example=tools is not None)
        result = grpo_jax.evaluate(
            policy.model,
            policy.params,
            policy.tokenizer,
            task,
            tools=tools,
            prompts=options.prompts,
            max_new_tokens=96,
        )
        found[kind] = result.summary()
        lines = (to_json_line(record) + "\n" for record in result.records(task.test))
        (options.runs / f"{name}-{kind}.jsonl").write_text("".join(lines))
    path.write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
