"""Programs of runs as compiled for TPUs, compared with those that were kept.

    TPU_LIBRARY_PATH=.../libtpu.so python benchmarks/tpu_check.py [0.5b-fsdp 8b-lora]

`make tpu-check` runs all of it. Each job is a run without its weights: `grpo-jax plan
--compile` of some phases. Per phase the table has what the compiler needs beside what
the plan estimates, what a device receives, and the least time. A job's line is
compared with the last one that was kept, and then appended.
"""

import dataclasses
import json
import os
import tempfile
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import tyro
from workloads import own_versions, publish, show, surroundings, versions

from grpo_jax.config import LoraConfig, MeshConfig, TrainConfig
from grpo_jax.training.compile_plan import compile_plan

KEPT = Path("benchmarks/results/tpu_check.jsonl")
PUBLISHED = Path(__file__).parents[1] / "tests/models/published_configs.json"
MIB, GIB = 2**20, 2**30
# A plan is mended if the compiler's peak is further from it, and a number that moved by
# more is reported.
PLAN, MOVED = 0.15, 0.01


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to compile.

    Attributes:
      model: of `published_configs.json`.
      target: the slice.
      phases: those of its programs that are compiled.
      layers: fewer than the model has: each layer of a loop over tokens is compiled.
      keys: of `config.json`, changed.
      run: fields of `TrainConfig`.
    """

    model: str
    target: str
    phases: tuple[str, ...]
    layers: int | None = None
    keys: dict[str, Any] = dataclasses.field(default_factory=dict)
    run: dict[str, Any] = dataclasses.field(default_factory=dict)


SMALL, BIG = "Qwen/Qwen2.5-0.5B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"
# Llama 3.1 8B.
EIGHT = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
# Llama 3.1 70B.
SEVENTY = EIGHT | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
UPDATE, LEARN, SAMPLE = ("update",), ("score", "update"), ("rollout",)
LORA = {"lora": LoraConfig(rank=16)}
LONG = {"max_prompt_tokens": 512, "max_new_tokens": 1024}
# The step of predict.py, of which a device computes one prompt at a time.
STEP = LONG | {"prompts_per_step": 64, "group_size": 8}
SPLIT = {"mesh": MeshConfig(tensor=8)}
JOBS = {
    "0.5b-fsdp": Job(SMALL, "v5e:2x4", LEARN),
    "0.5b-sampling": Job(SMALL, "v5e:2x4", (*SAMPLE, "evaluation"), layers=4),
    "0.5b-lora": Job(SMALL, "v5e:2x4", LEARN, run=LORA),
    "0.5b-layer": Job(SMALL, "v5e:2x4", UPDATE, run={"remat": "layer"}),
    "0.5b-float32": Job(SMALL, "v5e:2x4", UPDATE, run={"compute_dtype": "float32"}),
    "0.5b-data": Job(
        SMALL, "v5e:2x4", UPDATE, run={"mesh": MeshConfig(data=8, fsdp=1)}
    ),
    "0.5b-tensor": Job(
        SMALL, "v5e:2x4", LEARN, run={"mesh": MeshConfig(fsdp=4, tensor=2)}
    ),
    "0.5b-v6e": Job(SMALL, "v6e:2x4", LEARN),
    "0.5b-v5p": Job(SMALL, "v5p:2x2x2", UPDATE),
    "0.5b-hosts": Job(SMALL, "v5e:4x4", UPDATE),
    "1.5b-fsdp": Job(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "v5e:2x4",
        LEARN,
        run=LONG | {"microbatch_size": 64},
    ),
    "1.5b-sampling": Job(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "v5e:2x4",
        (*SAMPLE, "evaluation"),
        run=LONG,
    ),
    "gemma2-2b": Job("google/gemma-2-2b-it", "v6e:2x4", LEARN),
    "gemma2-sampling": Job("google/gemma-2-2b-it", "v6e:2x4", SAMPLE, layers=2),
    "qwen3-experts": Job("Qwen/Qwen3-30B-A3B", "v5p:2x2x2", LEARN, layers=8),
    "8b-lora": Job(
        BIG, "v5e:2x4", LEARN, keys=EIGHT, run=LORA | LONG | {"microbatch_size": 64}
    ),
    "8b-lora-sampling": Job(
        BIG, "v5e:2x4", SAMPLE, layers=2, keys=EIGHT, run=LORA | LONG
    ),
    "8b-full": Job(
        BIG, "v5p:2x2x1", LEARN, keys=EIGHT, run=LONG | {"microbatch_size": 64}
    ),
    "1b-v5e-8": Job(
        BIG, "v5e:2x4", (*LEARN, *SAMPLE), run=STEP | {"microbatch_size": 64}
    ),
    "8b-v6e-16": Job(
        BIG, "v6e:4x4", LEARN, keys=EIGHT, run=STEP | {"microbatch_size": 128}
    ),
    "8b-v5p-64": Job(
        BIG, "v5p:2x4x4", LEARN, keys=EIGHT, run=STEP | {"microbatch_size": 256}
    ),
    "70b-v5p-64": Job(
        BIG,
        "v5p:2x4x4",
        LEARN,
        keys=SEVENTY,
        run=STEP | SPLIT | {"microbatch_size": 32},
    ),
    "70b-lora-v6e-16": Job(
        BIG,
        "v6e:4x4",
        LEARN,
        keys=SEVENTY,
        run=LORA | STEP | SPLIT | {"microbatch_size": 16},
    ),
}


def main(
    jobs: tyro.conf.Positional[tuple[str, ...]] = (),
    *,
    out: Path | None = KEPT,
) -> None:
    """Compile the programs of some jobs; the last line is JSON.

    Args:
      jobs: names of `JOBS`; all by default.
      out: a file to which a line is appended for each job.
    """
    kept = read(KEPT)
    for name in jobs or JOBS:
        rows = measure(name)
        shown = {
            part: {key: value for key, value in row.items() if key != "sent"}
            for part, row in rows.items()
        }
        show(f"{name}: as compiled for {JOBS[name].target}, of each device", shown)
        for text in differences(name, kept.get(name, {}), rows):
            print(text, flush=True)
        line = {
            "benchmark": "tpu_check",
            "job": name,
            "target": JOBS[name].target,
            "rows": rows,
            "versions": own_versions() | library(),
            **surroundings(),
        }
        publish(line, out)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The newest rows that were kept of each job."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["job"]: line["rows"] for line in map(json.loads, lines)}


def library() -> dict[str, str]:
    """The version of libtpu: of the environment, or of the one that was named.

    `pip install --target` leaves what it installed beside the package.
    """
    named = os.environ.get("TPU_LIBRARY_PATH")
    if named is None:
        return versions("libtpu")
    folder = Path(named).resolve().parents[1]
    found = distributions(name="libtpu", path=[str(folder)])
    return {"libtpu": next((one.version for one in found), "unknown")}


def measure(name: str) -> dict[str, dict[str, Any]]:
    """A row for each program of a job, and one for each of its phases."""
    job = JOBS[name]
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads(PUBLISHED.read_text())[job.model] | job.keys
        if job.layers is not None:
            config["num_hidden_layers"] = job.layers
            config.pop("layer_types", None)
        Path(folder, "config.json").write_text(json.dumps(config))
        sizes = {
            "prompts_per_step": 16,
            "group_size": 8,
            "max_prompt_tokens": 128,
            "max_new_tokens": 256,
            "eval_prompts": 64,
        }
        run = TrainConfig(model=folder, **sizes | job.run)
        made = compile_plan(run, job.target, phases=job.phases, announce=print)
    rows = {
        f"{p['phase']}: {p['program']}": row_of(p) for p in made["compiled"]["programs"]
    }
    for phase, one in made["compiled"]["phases"].items():
        rows[phase] = {
            "peak GiB": one["peak"] / GIB,
            "plan GiB": one["plan"] / GIB,
            "ratio": one["ratio"],
            "remat": made["remat"],
        }
    return rows


def row_of(program: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a program."""
    if "error" in program:
        return {"error": program["error"].splitlines()[0][:200]}
    return {
        "args GiB": program["arguments"] / GIB,
        "temps GiB": program["temporaries"] / GIB,
        "peak GiB": program["peak"] / GIB,
        "GFLOP": program["flops"] / 1e9,
        "moved MiB": program["moved"] / MIB,
        "received MiB": program["received"] / MIB,
        "float32 MiB": sum(
            one["bytes"] / MIB for one in program["sent"] if one["dtype"] == "f32"
        ),
        "floor ms": 1e3 * (program["floor"] or 0.0),
        "compile s": program["compile_seconds"],
        "sent": program["sent"],
    }


def differences(
    name: str, before: dict[str, dict[str, Any]], rows: dict[str, dict[str, Any]]
) -> list[str]:
    """What is no longer as it was kept, and where the plan is wrong."""
    found = []
    for part, row in rows.items():
        old = before.get(part)
        for key, value in row.items() if old else ():
            was = old.get(key) if old else None
            if key in ("sent", "compile s") or was == value:
                continue
            near = (
                isinstance(value, int | float)
                and isinstance(was, int | float)
                and abs(value - was) <= MOVED * max(abs(value), abs(was))
            )
            if not near:
                found.append(f"changed: {name}, {part}: {key} {was} -> {value}")
        if abs(row.get("ratio", 1.0) - 1.0) > PLAN:
            found.append(
                f"plan: {name}, {part}: {row['plan GiB']:.2f} GiB, and the compiler "
                f"needs {row['peak GiB']:.2f}"
            )
    return found


if __name__ == "__main__":
    tyro.cli(main)
