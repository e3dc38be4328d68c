"""The objective of a run: its fields, and the objectives of papers as presets."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from grpo_jax.config.validation import (
    AboveOne,
    Count,
    NotNegative,
    Positive,
    Section,
    Share,
    Size,
)

# The fields in which the objective of each paper differs from the default.
_PRESETS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "likelihood": {
        "surrogate": "likelihood",
        "aggregation": "sequence_sum",
        "kl_coef": 0.0,
    },
    "grpo": {"advantage": "standardized"},
    "dr_grpo": {
        "advantage": "centered",
        "aggregation": "fixed_length",
        "kl_coef": 0.0,
    },
    "dapo": {
        "advantage": "standardized",
        "aggregation": "token_mean",
        "clip_high": 0.28,
        "kl_coef": 0.0,
        "overlong_share": 0.2,  # 4,096 of 20,480 tokens
        "resample_limit": 4,
    },
    "gspo": {
        "advantage": "standardized",
        "ratio_level": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "kl_coef": 0.0,
    },
    "cispo": {
        "advantage": "standardized",
        "surrogate": "cispo",
        "cispo_max_weight": 5.0,
        "aggregation": "token_mean",
        "kl_coef": 0.0,
    },
    "rloo": {
        "advantage": "leave_one_out",
        "surrogate": "likelihood",
        "aggregation": "sequence_sum",
        "kl_in": "reward",
    },
}

PRESETS = tuple(_PRESETS)  # their names


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Section):
    """What is optimized; the math and its sources are in `grpo_jax.objective`."""

    section: ClassVar[str] = "objective"
    # How a group's rewards become advantages.
    advantage: Literal["softmax", "standardized", "centered", "leave_one_out"] = (
        "softmax"
    )
    # Temperature of the softmax over a group's rewards, on the scale of the rewards.
    softmax_temperature: Positive = 1.0
    # Policy loss per token: clipped ratio, CISPO, or the plain log-likelihood.
    surrogate: Literal["clip", "cispo", "likelihood"] = "clip"
    # One importance ratio per token, or one per sequence (GSPO).
    ratio_level: Literal["token", "sequence"] = "token"
    clip_low: Positive = 0.2  # the ratio is clipped below at 1 - clip_low
    clip_high: Positive = 0.2  # the ratio is clipped above at 1 + clip_high
    # Limits the loss at dual_clip * |advantage| if the advantage is negative; above 1.
    dual_clip: AboveOne | None = None
    # Largest importance weight of the CISPO surrogate, as an absolute ratio.
    cispo_max_weight: Positive | None = None
    # Weight (beta) of the KL to the reference policy; 0: no reference is stored.
    kl_coef: NotNegative = 0.04
    # Add the KL to the loss per token, or subtract it from the reward (RLOO).
    kl_in: Literal["loss", "reward"] = "loss"
    kl_estimator: Literal["k2", "k3"] = "k3"  # per-token KL estimator
    entropy_coef: NotNegative = 0.0  # weight of the entropy bonus
    # Weight of the loss that spreads tokens over the experts of a mixture.
    router_aux_loss_coef: NotNegative = 0.0
    # Upper limit of the importance weights of learner to sampler; None: no weights.
    sampler_correction_cap: Positive | None = None
    # How the losses of the tokens become one number.
    aggregation: Literal[
        "sequence_mean", "sequence_sum", "token_mean", "fixed_length"
    ] = "sequence_mean"
    # Leave out completions that hit the length limit before they ended.
    mask_truncated: bool = False
    # A penalty grows to -1 over this last share of max_new_tokens (DAPO); None: none.
    overlong_share: Share | None = None
    # Standardized advantages are divided by the standard deviation of this set.
    std_over: Literal["group", "batch"] = "group"
    # Extra rollouts per step, at most, to replace groups with equal rewards (DAPO).
    resample_limit: Size = 0
    # Every so many steps, the current policy becomes the reference; None: never.
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
        return ObjectiveConfig(**_PRESETS[name])

    def problems(self) -> Iterator[str]:
        """Problems between fields, one line each."""
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

    def without_effect(self) -> Iterator[str]:
        """A line for each setting that was changed and that this objective ignores.

        They are no error: the fields of a preset may be changed one by one.
        """
        default = {field.name: field.default for field in fields(self)}
        rules = [
            ("surrogate", "clip", ("clip_low", "clip_high", "dual_clip")),
            ("surrogate", "cispo", ("cispo_max_weight",)),
            ("advantage", "softmax", ("softmax_temperature",)),
            ("advantage", "standardized", ("std_over",)),
        ]
        values = vars(self)
        ignored = {
            name: f"{decides} is {values[decides]!r}, not {needed!r}"
            for decides, needed, names in rules
            for name in names
            if values[decides] != needed
        }
        if self.kl_coef == 0:
            ignored |= dict.fromkeys(("kl_in", "kl_estimator"), "kl_coef is 0")
        for name, reason in ignored.items():
            if values[name] != default[name]:
                yield f"objective.{name} {values[name]!r} has no effect: {reason}"
