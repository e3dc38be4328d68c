"""A run of TRL's GRPOTrainer on rows with right answers: its curves, as JSON.

    benchmarks/peers/trl/bin/python benchmarks/peers/trl_learn.py RUN.json OUT.json

`experiments/trl_curves.py` writes RUN.json: model, rows and sizes of its own run. The
loss is TRL's default, with float32 weights, no reference model and no weight decay.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def correct(completions, answer, **_):
    """1.0 for each completion that is the answer, without outer spaces; else 0.0."""
    return [
        float(text.strip() == expected)
        for text, expected in zip(completions, answer, strict=True)
    ]


class Curves(TrainerCallback):
    """Mean rewards of steps, and the accuracy on held-out rows between them."""

    def __init__(self, run, tokenizer):
        self.run, self.tokenizer = run, tokenizer
        self.accuracy, self.rewards, self.seconds = {}, [], 0.0

    def on_train_begin(self, args, state, control, model, **_):
        """Measures the model as it was loaded."""
        self.measure(0, model)
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, model, **_):
        """Measures the model, now and then, off the clock."""
        step = state.global_step
        self.seconds += time.perf_counter() - self.start
        if step % self.run["eval_every"] == 0:
            self.measure(step, model)
        self.start = time.perf_counter()

    def on_log(self, args, state, control, logs, **_):
        """Keeps the mean reward of a step."""
        if "reward" in logs:
            self.rewards.append(float(logs["reward"]))

    def measure(self, step, model):
        """Greedy accuracy on the held-out rows."""
        rows, pad = self.run["test"], self.tokenizer.pad_token_id
        prompts = self.tokenizer(
            [row["prompt"] for row in rows],
            return_tensors="pt",
            padding=True,
            padding_side="left",
        ).to(model.device)
        was_training = model.training
        model.eval()
        with torch.no_grad():
            ids = model.generate(
                **prompts,
                do_sample=False,
                max_new_tokens=self.run["max_new_tokens"],
                pad_token_id=pad,
            )
        model.train(was_training)
        new = ids[:, prompts["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        right = correct(texts, [row["answer"] for row in rows])
        self.accuracy[step] = sum(right) / len(right)
        print(step, self.accuracy[step], flush=True)


def main(given, out):
    """Train, and write the curves."""
    run = json.loads(Path(given).read_text())
    tokenizer = AutoTokenizer.from_pretrained(run["model"])
    curves = Curves(run, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder,
            use_cpu=not torch.cuda.is_available(),
            seed=run["seed"],
            model_init_kwargs={"dtype": "float32"},
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=run["prompts_per_step"] * run["group_size"],
            num_generations=run["group_size"],
            max_completion_length=run["max_new_tokens"],
            max_steps=run["steps"],
            learning_rate=run["learning_rate"],
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=run["warmup_steps"],
            weight_decay=0.0,
            temperature=1.0,
            top_k=0,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        GRPOTrainer(
            model=run["model"],
            reward_funcs=correct,
            args=args,
            train_dataset=Dataset.from_list(run["train"]),
            processing_class=tokenizer,
            callbacks=[curves],
        ).train()
    made = {
        "rewards": curves.rewards,
        "accuracy": [[step, value] for step, value in curves.accuracy.items()],
        "seconds": curves.seconds,
    }
    Path(out).write_text(json.dumps(made) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
