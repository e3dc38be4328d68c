"""The steps of a workload with TRL's GRPOTrainer: one JSON line, as step.py prints.

    benchmarks/peers/trl/bin/python benchmarks/peers/trl_step.py tiny

Held equal to step.py: model and prompts, float32 weights and Adam state, exactly T new
tokens (`min_new_tokens`), temperature 1, beta 0.04 with a reference model, one update
per rollout, the GRPO loss, a gradient norm of at most 1, no weight decay. Phases are
timed around the trainer's own methods; a step runs from the end of the one before.
Lengths are geometric by a logits processor that takes the EOS token now and then.
"""

import argparse
import functools
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer
from workloads import (
    WORKLOADS,
    exact_prompts,
    publish,
    record,
    reward,
    versions,
)

WARMUP = 1


class Clock(TrainerCallback):
    """Seconds per phase, one row per step."""

    def __init__(self):
        self.rows, self.row, self.start = [], {}, 0.0

    def timed(self, function, name):
        """The function; the seconds it takes are added to `name` of the step."""

        def call(*args, **options):
            start = time.perf_counter()
            result = function(*args, **options)
            key = name() if callable(name) else name
            self.row[key] = self.row.get(key, 0.0) + time.perf_counter() - start
            return result

        return call

    def on_train_begin(self, *args, **options):
        """Starts the first step."""
        self.start = time.perf_counter()

    def on_step_end(self, *args, **options):
        """Ends a step; what was not preparation was the update."""
        now = time.perf_counter()
        step = now - self.start
        timed = ("rollout", "reference", "tokens")
        row = {name: self.row.get(name, 0.0) for name in timed}
        update = step - self.row["prepare"]
        self.rows.append(row | {"update": update, "step": step})
        print({name: round(value, 2) for name, value in self.rows[-1].items()})
        self.row, self.start = {}, now


class EndsAtRandom(LogitsProcessor):
    """Ends each completion at each token with probability 1 / mean, and never else."""

    def __init__(self, mean, eos):
        self.mean, self.eos = mean, eos

    def __call__(self, input_ids, scores):
        """Scores of which one, or all others, are impossible."""
        ends = torch.rand(len(scores), 1, device=scores.device) < 1 / self.mean
        is_eos = torch.arange(scores.shape[1], device=scores.device) == self.eos
        scores = scores.masked_fill(ends != is_eos, -torch.inf)
        # It may be impossible for others' reasons.
        return scores.masked_fill(ends & is_eos, 0.0)


def main():
    """Run the steps and print the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--models", type=Path, default=Path("benchmarks/models"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    work = WORKLOADS[args.workload]
    folder = str(work.folder(args.models))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = exact_prompts(
        lambda text: tokenizer(text)["input_ids"], 64, work.prompt_tokens
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        trainer = GRPOTrainer(
            model=folder,
            reward_funcs=lambda completions, **_: reward(completions),
            args=config(work, out, steps=args.steps or work.steps, dtype=args.dtype),
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        watch(trainer, clock, work)
        if work.mean_tokens is not None:
            ends = EndsAtRandom(work.mean_tokens, tokenizer.eos_token_id)
            trainer.model.generate = functools.partial(
                trainer.model.generate, logits_processor=LogitsProcessorList([ends])
            )
        trainer.train()
    line = record(
        f"trl-{args.dtype}",
        work,
        clock.rows[WARMUP:],
        steps=len(clock.rows) - WARMUP,
        versions=versions("torch", "trl", "transformers"),
    )
    publish(line, args.out)


def config(work, out, *, steps, dtype):
    """The same step as that of step.py."""
    return GRPOConfig(
        output_dir=out,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        model_init_kwargs={"dtype": dtype},
        gradient_checkpointing=False,
        per_device_train_batch_size=work.sequences,
        num_generations=work.group,
        max_completion_length=work.new_tokens,
        generation_kwargs={
            "min_new_tokens": 1 if work.mean_tokens else work.new_tokens
        },
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=work.kl_coef,
        loss_type="grpo",
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_steps=steps,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )


def watch(trainer, clock, work):
    """Put the clock around the trainer's phases, and check what it generates."""
    generate = trainer._generate

    def checked(prompts):
        result = generate(prompts)
        assert {len(ids) for ids in result[0]} == {work.prompt_tokens}
        lengths = [len(ids) for ids in result[1]]
        work.check(lengths)
        clock.row["tokens"] = sum(lengths)
        return result

    trainer._generate = clock.timed(checked, "rollout")
    trainer._get_per_token_logps_and_entropies = clock.timed(
        trainer._get_per_token_logps_and_entropies,
        lambda: "forward" if torch.is_grad_enabled() else "reference",
    )
    trainer._prepare_inputs = clock.timed(trainer._prepare_inputs, "prepare")


if __name__ == "__main__":
    main()
