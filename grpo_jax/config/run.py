"""Every choice of a run, as frozen dataclasses that check themselves.

Sources are taken in order: the defaults here, a YAML file, then flags. `None` means
off or automatic. A wrong value raises `ValueError` with the field, the value and the
remedy.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from grpo_jax.config.presets import OBJECTIVES
from grpo_jax.config.validation import (
    AboveOne,
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

# Stands for "not given": `TrainConfig` replaces it by the value that suits the model.
UNSET: Any = None

# Matrices of a layer that may get adapters.
Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]

PRESETS = tuple(OBJECTIVES)  # their names

EMBEDDED = "embedded"  # the small model that comes with the package


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Section):
    """What is optimized; the math and its sources are in `grpo_jax.objective`."""

    section: ClassVar[str] = "objective"
    # How a group's rewards become advantages.
    advantage: Literal["softmax", "standardized", "centered", "leave_one_out"] = (
        "softmax"
    )
    # Temperature of the softmax over a group's rewards, in units of reward.
    softmax_temperature: Positive = 1.0
    # Policy loss per token: clipped ratio, CISPO, or the plain log-likelihood.
    surrogate: Literal["clip", "cispo", "likelihood"] = "clip"
    # One importance ratio per token, or one per sequence (GSPO).
    ratio_level: Literal["token", "sequence"] = "token"
    clip_low: Positive = 0.2  # the ratio is clipped below at 1 - clip_low
    clip_high: Positive = 0.2  # the ratio is clipped above at 1 + clip_high
    # Bounds the loss of bad completions at dual_clip * |advantage|; must exceed 1.
    dual_clip: AboveOne | None = None
    # Largest importance weight of the CISPO surrogate, as an absolute ratio.
    cispo_max_weight: Positive | None = None
    # Weight of the KL to the frozen reference (beta); 0 holds no reference.
    kl_coef: NotNegative = 0.04
    # Add the KL to the loss per token, or take it from the reward per sequence (RLOO).
    kl_in: Literal["loss", "reward"] = "loss"
    kl_estimator: Literal["k2", "k3"] = "k3"  # per-token KL estimator
    entropy_coef: NotNegative = 0.0  # weight of the entropy bonus
    # Cap of the truncated importance weight between sampler and learner; None is off.
    sampler_correction_cap: Positive | None = None
    # How tokens become one number.
    aggregation: Literal[
        "sequence_mean", "sequence_sum", "token_mean", "fixed_length"
    ] = "sequence_mean"
    # Leave out completions that hit the length limit before they ended.
    mask_truncated: bool = False
    # Last share of max_new_tokens in which a penalty grows to -1 (DAPO).
    overlong_share: Share | None = None
    # Rewards of standardized advantages are divided by the deviation of this set.
    std_over: Literal["group", "batch"] = "group"
    # Extra rollouts a step may take to replace groups of equal rewards (DAPO).
    resample_limit: Size = 0
    # Steps after which the reference policy becomes the current one; None is never.
    reference_every: Count | None = None

    @staticmethod
    def preset(name: str) -> "ObjectiveConfig":
        """The objective of a paper, each as its authors state it.

        - ``softmax``: advantages G·softmax(r/τ) - 1, clip and KL; the default.
        - ``likelihood``: -Σᵢ softmax(r/τ)ᵢ log π(yᵢ|x), no ratio and no KL.
        - ``grpo``: DeepSeekMath, Shao et al. 2024, eq. 3 and 4,
          https://arxiv.org/abs/2402.03300.
        - ``dr_grpo``: Liu et al. 2025, section 3, https://arxiv.org/abs/2503.20783.
        - ``dapo``: Yu et al. 2025, eq. 8 to 13, https://arxiv.org/abs/2503.14476.
        - ``gspo``: Zheng et al. 2025, eq. 5 to 7, https://arxiv.org/abs/2507.18071.
        - ``cispo``: MiniMax-M1 2025, eq. 4 and 5, https://arxiv.org/abs/2506.13585.
        - ``rloo``: Ahmadian et al. 2024, section 3.3, https://arxiv.org/abs/2402.14740.

        Raises:
          ValueError: for any other name.
        """
        if name not in PRESETS:
            known = ", ".join(PRESETS)
            raise ValueError(
                f"objective preset {name!r} is unknown; use one of {known}."
            )
        return ObjectiveConfig(**OBJECTIVES[name])

    def problems(self) -> Iterator[str]:
        """What is wrong between fields, one line each."""
        if self.clip_low > self.clip_high:
            yield (
                f"clip_low {self.clip_low} must not exceed clip_high {self.clip_high}: "
                "raise clip_high (0.28 in DAPO) or lower clip_low"
            )
        if self.surrogate == "clip" and self.clip_low >= 1:
            yield f"clip_low must be below 1, got {self.clip_low}: a ratio is positive"
        if self.surrogate == "cispo" and self.cispo_max_weight is None:
            yield "cispo_max_weight is needed by surrogate 'cispo'; 5.0 is usual"
        if self.reference_every is not None and self.kl_coef == 0:
            yield "reference_every has no effect while kl_coef is 0; set kl_coef"


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
class OptimizerConfig(Section):
    """AdamW and its schedule."""

    section: ClassVar[str] = "optimizer"
    learning_rate: Positive = 1e-6  # peak learning rate
    # The rate after the warm-up: it stays, or falls to 0 at the last update.
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: Size = 0  # updates over which the rate rises from 0
    b1: Decay = 0.9  # decay of the first moment
    b2: Decay = 0.999  # decay of the second moment
    weight_decay: NotNegative = 0.0  # decoupled weight decay
    max_grad_norm: Positive | None = 1.0  # global norm at which gradients are clipped


@dataclass(frozen=True, kw_only=True)
class RewardsConfig(Section):
    """How reward functions are called."""

    section: ClassVar[str] = "rewards"
    weights: tuple[Finite, ...] | None = None  # one per function; None weighs all by 1
    timeout_seconds: Positive | None = None  # time limit of a batch, per function
    isolate: bool = False  # score in a process of its own
    # What an exception in a reward function costs: the run, or that completion.
    on_error: Literal["raise", "drop"] = "raise"


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Section):
    """Low-rank adapters, Hu et al. 2021, https://arxiv.org/abs/2106.09685."""

    section: ClassVar[str] = "lora"
    rank: Count | None = None  # width of the adapters; None trains all weights
    alpha: Positive = 32.0  # the adapters' output is scaled by alpha / rank
    # The projections that get adapters.
    targets: tuple[Projection, ...] = ("q", "k", "v", "o", "gate", "up", "down")

    @property
    def scale(self) -> float | None:
        """What multiplies the adapters' output; None without adapters."""
        return None if self.rank is None else self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """When the state is saved and what is kept."""

    section: ClassVar[str] = "checkpoint"
    every: Count = 50  # steps between saves; the last step is always saved
    keep: Count = 3  # newest checkpoints that are kept
    keep_every: Count | None = None  # besides, keep each step that this number divides
    # Besides, keep the step with the best value of this metric, say eval/accuracy; of
    # equal ones the first.
    keep_best: Text | None = None
    # The best value: the largest or smallest; None: as the metric says, a reward or an
    # accuracy the largest, the loss or the kl the smallest. Others need it.
    best_mode: Literal["max", "min"] | None = None
    # Seconds between the request to stop and the end of the machine, for a warning when
    # a phase of a step takes longer: then the run resumes from its last checkpoint.
    grace_seconds: Positive = 30.0


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """How devices and processes share the work."""

    section: ClassVar[str] = "mesh"
    # Devices along the data axis; one axis may be -1: all that are left.
    data: AxisSize = 1
    # Devices over which parameters are split, and the batch with them.
    fsdp: AxisSize = -1
    tensor: AxisSize = 1  # devices over which single matrices are split
    # jit splits parameters and batch as the axes say; pmap is data parallelism alone.
    mode: Literal["jit", "pmap"] = "jit"
    # The sampler's parameters: gathered over fsdp once per rollout, or left split and
    # gathered layer by layer at each token; auto: gathered, if they fit.
    sampler: Literal["auto", "gathered", "split"] = "auto"
    # What lies in the host's memory while it is not in use.
    offload: tuple[Literal["reference", "optimizer"], ...] = ()
    coordinator: str | None = None  # host:port of process 0; None finds it by itself
    num_processes: Count | None = None  # processes in all
    process_id: Size | None = None  # number of this process, from 0

    def problems(self) -> Iterator[str]:
        """What is wrong between fields, one line each."""
        if (self.data, self.fsdp, self.tensor).count(-1) > 1:
            yield "data, fsdp and tensor: only one of them may be -1"
        if self.mode == "pmap" and self.tensor not in (1, -1):
            yield f"mode 'pmap' splits data only; tensor must be 1, got {self.tensor}"
        if self.mode == "pmap" and self.offload:
            yield "offload needs mode 'jit'; with data -1 and fsdp 1 it is the same"


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Section):
    """What is shown and written while the run goes on."""

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
    `microbatch_size` is a memory knob only and changes no number beyond rounding.
    """

    model: Text = EMBEDDED  # hub name, folder, .gguf file, or the embedded model
    task: Text = "arithmetic"  # arithmetic, gsm8k, reasoning_gym:NAME or a .jsonl file
    data: str | None = None  # local file or folder with the task's rows
    run_dir: str | None = None  # where the run is kept; None: runs/<task>
    steps: Count = UNSET  # rollouts, each followed by its updates
    seed: Seed = 0  # every random number of the run follows from it
    prompts_per_step: Count = UNSET  # prompts of a step, over all processes
    group_size: Count = 8  # completions per prompt
    updates_per_rollout: Count = 1  # passes over a rollout
    minibatches: Count = 1  # optimizer updates per pass
    microbatch_size: Count | None = None  # sequences held at once; None: all
    max_prompt_tokens: Count = 512  # longer prompts are an error
    max_new_tokens: Count = UNSET  # completions are cut at this length
    # Steps between evaluations, of which one is before the first step and one after the
    # last; 0: none at all.
    eval_every: Size = UNSET
    eval_prompts: Size = UNSET  # held-out prompts of an evaluation; 0: none at all
    # Held-out prompts that are completed at once; None: as many as a rollout has
    # sequences, or fewer, so that they need no more memory than training.
    eval_batch_size: Count | None = None
    # Number type of the matrix products; auto: float32 on CPU, elsewhere bfloat16.
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # What the backward pass computes again to save memory: nothing, all but the matrix
    # products (dots), or whole layers; auto: as little as the memory allows.
    remat: Literal["auto", "none", "layer", "dots"] = "auto"
    # What is optimized.
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    # How the next token is drawn.
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    # AdamW and its schedule.
    optimizer: OptimizerConfig = UNSET
    # How reward functions are called.
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    # Low-rank adapters; off without a rank.
    lora: LoraConfig = field(default_factory=LoraConfig)
    # When the state is saved and what is kept.
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    # How devices and processes share the work.
    mesh: MeshConfig = field(default_factory=MeshConfig)
    # What is shown and written while the run goes on.
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        """Fill in what was left out, then check; raises ValueError."""
        defaults = _EMBEDDED_RUN if self.model == EMBEDDED else _PRETRAINED_RUN
        for name, value in defaults.items():
            if vars(self)[name] is UNSET:
                object.__setattr__(self, name, value)
        super().__post_init__()

    def problems(self) -> Iterator[str]:
        """What is wrong between fields, one line each."""
        if self.run_dir is not None and "://" in self.run_dir:
            yield (
                f"run_dir must be a local folder, got {self.run_dir!r}; mount a bucket "
                "(Cloud Storage FUSE) and give the folder"
            )
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
        elif not self._microbatch_fits(prompts // self.minibatches * group):
            sequences = prompts // self.minibatches * group
            yield (
                f"microbatch_size {self.microbatch_size} must hold whole groups of "
                f"{group} and divide the {sequences} sequences of an update, or divide "
                f"a group; {group} always does"
            )
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
        if self.sampling.temperature == 0:
            yield (
                "sampling.temperature must be above 0 in training: equal completions "
                "teach nothing; 1.0 is usual"
            )

    def _microbatch_fits(self, sequences: int) -> bool:
        micro, group = self.microbatch_size, self.group_size
        if micro is None or group % micro == 0:
            return True
        return micro % group == 0 and sequences % micro == 0

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
