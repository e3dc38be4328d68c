"""The objectives of papers, as the fields in which they differ from the default."""

from typing import Any

OBJECTIVES: dict[str, dict[str, Any]] = {
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
