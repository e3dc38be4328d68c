"""The configuration of a run, as frozen dataclasses that check themselves.

Later sources override earlier ones: the defaults here, a YAML file, then flags. `None`
means off or automatic. A wrong value raises `ValueError` with the field, the value and
the remedy.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from grpo_jax.config.objective import ObjectiveConfig
from grpo_jax.config.validation import (
    AxisSize,
    Count,
    Decay,
    Finite,
    NotNegative,
    Positive,
    Section,
    Seed,
    Share,
    Size,
    Text,
)

# "Not given": `TrainConfig` replaces it by the default for its model.
UNSET: Any = None

# The projections of a layer that can have adapters: of the attention, then of the MLP.
_Usual = Literal["q", "k", "v", "o", "gate", "up", "down"]
LORA_TARGETS: tuple[_Usual, ...] = get_args(_Usual)
# Those of layers without attention.
_OfDelta = Literal["delta_qkv", "delta_z", "delta_b", "delta_a", "delta_o"]
DELTA_TARGETS: tuple[_OfDelta, ...] = get_args(_OfDelta)
_OfConv = Literal["conv_bcx", "conv_o"]
CONV_TARGETS: tuple[_OfConv, ...] = get_args(_OfConv)
_LoraTarget = Literal[_Usual, _OfDelta, _OfConv]

EMBEDDED = "embedded"  # the small model that comes with the package
# Without the parts "." and "..", which would lead out of the folder.
_BUCKET = r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/(?!\.\.?(/|$))[A-Za-z0-9._=-]+)+/?"


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Section):
    """How the next token is drawn."""

    section: ClassVar[str] = "sampling"
    temperature: NotNegative = 1.0  # divides the logits; 0 takes the likeliest token
    top_k: Count | None = None  # keep the k likeliest tokens
    top_p: Share | None = None  # keep the likeliest tokens up to this probability
    min_p: Share | None = None  # keep tokens above this share of the likeliest one
    # Token ids that end a completion; None: the model's own.
    stop_ids: tuple[Size, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Section):
    """How completions share the sampler."""

    section: ClassVar[str] = "rollout"
    # Completions that decode together, over all devices; others wait until one ends.
    # None: those of a step.
    slots: Count | None = None
    # End a step when enough groups are complete; the others continue in the next, with
    # the log-probs and the versions of the policy that their tokens were drawn with.
    carry_over: bool = False
    # Most steps from a group's first token to its update, with carry_over.
    max_staleness: Size = 4

    def problems(self) -> Iterator[str]:
        """Problems between fields, one line each."""
        if self.carry_over and not self.max_staleness:
            yield (
                "max_staleness must be at least 1 with carry_over, got 0: no group "
                "could continue in the next step; set carry_over to false instead"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """AdamW and its schedule."""

    section: ClassVar[str] = "optimizer"
    learning_rate: Positive = 1e-6  # peak learning rate
    # After the warm-up, the rate stays constant or falls to 0 at the last update.
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: Size = 0  # updates over which the rate rises from 0
    b1: Decay = 0.9  # decay rate of the first moment
    b2: Decay = 0.999  # decay rate of the second moment
    weight_decay: NotNegative = 0.0  # decoupled weight decay
    max_grad_norm: Positive | None = 1.0  # global norm at which gradients are clipped


@dataclass(frozen=True, kw_only=True)
class RewardsConfig(Section):
    """How reward functions are called."""

    section: ClassVar[str] = "rewards"
    weights: tuple[Finite, ...] | None = None  # one per function; None: all are 1
    timeout_seconds: Positive | None = None  # time limit of one call of a function
    isolate: bool = False  # run the functions in a separate process
    # After an exception in a reward function: end the run (raise), or give the
    # completion no reward (drop).
    on_error: Literal["raise", "drop"] = "raise"


@dataclass(frozen=True, kw_only=True)
class EnvironmentsConfig(Section):
    """How tools are called and environments are played."""

    section: ClassVar[str] = "environments"
    # Most turns of a completion that tools or an environment answer. None: as many as
    # fit into max_new_tokens.
    max_tool_calling_iterations: Count | None = None
    tool_timeout_seconds: Positive | None = 60.0  # of one call of a tool, or one step
    # Time limit of all calls of one episode together, its reset included.
    episode_timeout_seconds: Positive | None = None
    isolate: bool = False  # run environments and tools in separate processes
    # Calls that run at once; async ones are not counted. With isolate, the processes,
    # of which there are no more than CPU cores.
    workers: Count = 32


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Section):
    """Low-rank adapters, Hu et al. 2021, https://arxiv.org/abs/2106.09685."""

    section: ClassVar[str] = "lora"
    rank: Count | None = None  # width of the adapters; None trains all weights
    alpha: Positive = 32.0  # the adapters' output is scaled by alpha / rank
    # The projections that get adapters.
    targets: tuple[_LoraTarget, ...] = LORA_TARGETS
    # The frozen base: in the compute dtype (auto), or the kernels of its layers in
    # 8 bits (int8) or 4 (nf4).
    base_dtype: Literal["auto", "int8", "nf4"] = "auto"

    def problems(self) -> Iterator[str]:
        """Problems between fields, one line each."""
        if self.base_dtype != "auto" and self.rank is None:
            yield (
                f"base_dtype {self.base_dtype!r} is for the frozen base of adapters, "
                "and all weights are trained; set lora.rank, 16 is usual, or "
                "base_dtype 'auto'"
            )

    @property
    def quantized(self) -> Literal["int8", "nf4"] | None:
        """How the base is quantized; None if it is not."""
        return None if self.base_dtype == "auto" else self.base_dtype

    @property
    def scale(self) -> float | None:
        """The factor of the adapters' output, alpha / rank; None without adapters."""
        return None if self.rank is None else self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """When the state is saved and what is kept."""

    section: ClassVar[str] = "checkpoint"
    every: Count = 50  # steps between saves; the last step is always saved
    keep: Count = 3  # number of newest checkpoints to keep
    keep_every: Count | None = None  # also keep every multiple of this number
    # Also keep the step with the best value of this metric, such as eval/accuracy.
    # Among equal values the first step is the best.
    keep_best: Text | None = None
    # The best value is the largest (max) or the smallest (min). None: max for rewards
    # and accuracy, min for loss and kl; for any other metric, set this field.
    best_mode: Literal["max", "min"] | None = None
    # Seconds between the notice to stop and the end of the machine. The run warns if a
    # phase of a step takes longer, because it could then not save in time.
    grace_seconds: Positive = 30.0


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """How devices and processes share the work."""

    section: ClassVar[str] = "mesh"
    # Devices that split the batch only. One of the three axes may be -1: all devices
    # that the other axes leave.
    data: AxisSize = 1
    # Devices that split the parameters and also the batch.
    fsdp: AxisSize = -1
    tensor: AxisSize = 1  # devices that split each matrix (tensor parallelism)
    # jit splits parameters and batch as the axes say; pmap splits the batch only.
    mode: Literal["jit", "pmap"] = "jit"
    # Parameters during sampling: gathered over fsdp once per rollout (gathered), or
    # layer by layer at each token (split). auto: gathered, if they fit.
    sampler: Literal["auto", "gathered", "split"] = "auto"
    # State that waits in host memory until a step needs it.
    offload: tuple[Literal["reference", "optimizer"], ...] = ()
    coordinator: str | None = None  # host:port of process 0; None: JAX finds it
    num_processes: Count | None = None  # total number of processes
    process_id: Size | None = None  # number of this process, from 0

    def problems(self) -> Iterator[str]:
        """Problems between fields, one line each."""
        if (self.data, self.fsdp, self.tensor).count(-1) > 1:
            yield "data, fsdp and tensor: only one of them may be -1"
        if self.mode == "pmap" and self.tensor not in (1, -1):
            yield f"mode 'pmap' splits data only; tensor must be 1, got {self.tensor}"
        if self.mode == "pmap" and self.offload:
            yield "offload needs mode 'jit'; with data -1 and fsdp 1 it is the same"


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Section):
    """What is shown and written during the run."""

    section: ClassVar[str] = "report"
    log_every: Count = 1  # steps between lines on the console
    completions_every: Count = 10  # steps between files of completions
    tensorboard: bool = False  # write TensorBoard files into the run directory
    wandb: bool = False  # log to Weights & Biases


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """A whole run. Values left out are those that suit the model.

    `prompts_per_step x group_size` is the number of sequences of a step;
    `updates_per_rollout` passes over `minibatches` make the optimizer updates;
    `microbatch_size` affects memory only; it changes numbers by rounding at most.
    """

    model: Text = EMBEDDED  # hub name, folder, .gguf file, or the embedded model
    # arithmetic, gsm8k, gsm8k:boxed, reasoning_gym:NAME or a .jsonl file
    task: Text = "arithmetic"
    data: str | None = None  # local file or folder with the task's rows
    # Where the run is stored, a folder or gs://bucket/folder; None: runs/<task>
    run_dir: str | None = None
    steps: Count = UNSET  # rollouts, each followed by its updates
    seed: Seed = 0  # all random numbers of the run depend on it
    prompts_per_step: Count = UNSET  # prompts of a step, over all processes
    group_size: Count = 8  # completions per prompt
    updates_per_rollout: Count = 1  # passes over a rollout
    minibatches: Count = 1  # optimizer updates per pass
    microbatch_size: Count | None = None  # sequences in memory at once; None: all
    max_prompt_tokens: Count = 512  # a longer prompt is an error
    max_new_tokens: Count = UNSET  # completions are cut at this length
    # Steps between evaluations; there is also one before the first step and one after
    # the last. 0: no evaluation.
    eval_every: Size = UNSET
    eval_prompts: Size = UNSET  # held-out prompts of an evaluation; 0: none
    # Held-out prompts that are completed at once. None: the number of sequences of a
    # rollout, or fewer if they would need more memory than training.
    eval_batch_size: Count | None = None
    # dtype of the matrix products; auto: bfloat16, on a CPU float32, there bfloat16 for
    # scoring and updates of large models if CPU and jax (0.11) have instructions for it
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # What the backward pass recomputes to save memory: nothing (none), everything
    # except matrix products (dots), or whole layers (layer). auto: as little as fits.
    remat: Literal["auto", "none", "layer", "dots"] = "auto"
    # How attention to whole sequences and, on a TPU, the products of experts are
    # computed: by kernels where they are faster (auto), or by XLA alone (xla).
    attention: Literal["auto", "xla"] = "auto"
    # Scoring and updates with less padding: completions of a prompt in shared rows, or
    # microbatches of like length, where either is faster (auto), or neither (off).
    packing: Literal["auto", "off"] = "auto"
    # What is optimized.
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    # How the next token is drawn.
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    # How completions share the sampler.
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    # AdamW and its schedule.
    optimizer: OptimizerConfig = UNSET
    # How reward functions are called.
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    # How tools are called and environments are played.
    environments: EnvironmentsConfig = field(default_factory=EnvironmentsConfig)
    # Low-rank adapters; off without a rank.
    lora: LoraConfig = field(default_factory=LoraConfig)
    # When the state is saved and what is kept.
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    # How devices and processes share the work.
    mesh: MeshConfig = field(default_factory=MeshConfig)
    # What is shown and written during the run.
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        """Fill in the defaults of the model, then check; raises ValueError."""
        defaults = _EMBEDDED_RUN if self.model == EMBEDDED else _PRETRAINED_RUN
        for name, value in defaults.items():
            if vars(self)[name] is UNSET:
                object.__setattr__(self, name, value)
        super().__post_init__()

    def problems(self) -> Iterator[str]:
        """Problems between fields, one line each."""
        place = self.run_dir or ""
        remote = "://" in place or place.startswith("gs:")
        if remote and not re.fullmatch(_BUCKET, place):
            yield (
                "run_dir must be a local folder or gs://BUCKET/FOLDER, with letters, "
                f"digits and . _ = - in each part of the folder, got {place!r}"
            )
        yield from self._batch_problems()
        best = self.checkpoint.keep_best
        if best is not None and best.startswith("eval/"):
            for name in ("eval_every", "eval_prompts"):
                if not vars(self)[name]:
                    yield f"{name} must be above 0 for checkpoint.keep_best {best!r}"
        has_reference = self.objective.kl_coef > 0 and self.lora.rank is None
        if "reference" in self.mesh.offload and not has_reference:
            yield (
                "mesh.offload 'reference' has nothing to move: without objective."
                "kl_coef there is no reference, and with adapters it is their base"
            )
        if self.rollout.carry_over:
            if self.objective.resample_limit:
                yield (
                    "objective.resample_limit must be 0 with rollout.carry_over: "
                    "groups that replace others would begin a step too late"
                )
            if self.objective.sampler_correction_cap is not None:
                yield (
                    "objective.sampler_correction_cap must be null with rollout."
                    "carry_over: the ratio already uses the sampler's log-probs"
                )
        if self.sampling.temperature == 0:
            yield (
                "sampling.temperature must be above 0 in training: equal completions "
                "teach nothing; 1.0 is usual"
            )

    def _batch_problems(self) -> Iterator[str]:
        prompts, group = self.prompts_per_step, self.group_size
        if group < 2:
            yield (
                f"group_size must be at least 2, got {group}: a completion is judged "
                "against the others of its group; 8 is usual"
            )
        if prompts % self.minibatches:
            yield (
                f"minibatches {self.minibatches} must divide prompts_per_step {prompts}"
            )
            return
        micro, sequences = self.microbatch_size, prompts // self.minibatches * group
        if micro is None or group % micro == 0:
            return
        if micro % group or sequences % micro:
            yield (
                f"microbatch_size {micro} must hold whole groups of {group} and divide "
                f"the {sequences} sequences of an update, or divide a group; {group} "
                "always does"
            )

    @property
    def prompts_per_update(self) -> int:
        """Prompts of one optimizer update, over all processes."""
        return self.prompts_per_step // self.minibatches

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates that follow one rollout."""
        return self.updates_per_rollout * self.minibatches


_EMBEDDED_RUN = {
    "steps": 120,
    "prompts_per_step": 32,
    "max_new_tokens": 8,
    "eval_every": 20,
    "eval_prompts": 1001,
    "optimizer": OptimizerConfig(learning_rate=2e-4, warmup_steps=10),
}
_PRETRAINED_RUN = {
    "steps": 200,
    "prompts_per_step": 16,
    "max_new_tokens": 256,
    "eval_every": 50,
    "eval_prompts": 256,
    "optimizer": OptimizerConfig(),
}
