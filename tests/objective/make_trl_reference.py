"""Write trl_reference.json: losses, gradients and metrics that TRL computes.

It calls TRL's own `GRPOTrainer._compute_loss` on a stand-in trainer that has the
options the method reads and hands it fixed log-probabilities, in float64. It needs
torch and trl 1.16, which the project does not depend on:

    python tests/objective/make_trl_reference.py
"""

import collections
import json
import pathlib
import types

import torch
import trl
from trl import GRPOTrainer

SEQUENCES, TOKENS, MAX_LENGTH = 6, 8, 10
LENGTHS = (8, 5, 1, 7, 6, 3)
ADVANTAGES = (1.5, -0.7, 0.4, -1.2, 0.0, 2.0)

# name -> (TRL's options, the arguments of grpo_loss that mean the same)
CASES = {
    "grpo": ({}, {}),
    "grpo on-policy": ({"on_policy": True}, {}),
    "grpo kl": ({"beta": 0.04}, {"kl_coef": 0.04}),
    "grpo clip-higher": ({"epsilon_high": 0.28}, {"clip_high": 0.28}),
    "grpo delta": ({"delta": 1.4}, {"dual_clip": 1.4}),
    "bnpo kl": (
        {"loss_type": "bnpo", "beta": 0.04},
        {"aggregation": "token_mean", "kl_coef": 0.04},
    ),
    "dapo clip-higher delta": (
        {"loss_type": "dapo", "epsilon_high": 0.28, "delta": 1.5},
        {"aggregation": "token_mean", "clip_high": 0.28, "dual_clip": 1.5},
    ),
    "dapo entropy": (
        {"loss_type": "dapo", "entropy_coef": 0.01},
        {"aggregation": "token_mean", "entropy_coef": 0.01},
    ),
    "dr_grpo kl": (
        {"loss_type": "dr_grpo", "beta": 0.04},
        {"aggregation": "fixed_length", "max_length": MAX_LENGTH, "kl_coef": 0.04},
    ),
    "luspo": ({"loss_type": "luspo"}, {"aggregation": "sequence_sum"}),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.2},
        {"aggregation": "token_mean", "surrogate": "cispo", "cispo_max_weight": 1.2},
    ),
    "cispo kl": (
        {"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.04},
        {
            "aggregation": "token_mean",
            "surrogate": "cispo",
            "cispo_max_weight": 5.0,
            "kl_coef": 0.04,
        },
    ),
    "gspo": (
        {"level": "sequence", "epsilon": 0.05, "epsilon_high": 0.1},
        {"ratio_level": "sequence", "clip_low": 0.05, "clip_high": 0.1},
    ),
    "gspo kl": (
        {"level": "sequence", "beta": 0.04},
        {"ratio_level": "sequence", "kl_coef": 0.04},
    ),
    "sampler correction kl": (
        {"sampler_cap": 1.3, "beta": 0.04},
        {"sampler_correction_cap": 1.3, "kl_coef": 0.04},
    ),
}


def make_inputs() -> dict[str, torch.Tensor]:
    """Fixed arrays; the log-ratios spread to every side of the clip."""
    generator = torch.Generator().manual_seed(0)

    def normal(scale: float) -> torch.Tensor:
        noise = torch.randn(SEQUENCES, TOKENS, generator=generator, dtype=torch.float64)
        # Few decimals, so that the file is short and float32 holds them closely.
        return (scale * noise).round(decimals=3)

    logp = normal(0.8) - 2.0
    return {
        "logp": logp,
        "old_logp": logp + normal(0.5),
        "ref_logp": logp + normal(0.5),
        "sampler_logp": logp + normal(0.3),
        "entropy": normal(0.3) + 1.5,
        "mask": torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None],
        "advantages": torch.tensor(ADVANTAGES, dtype=torch.float64),
    }


def make_trainer(options: dict, logp: torch.Tensor, entropy: torch.Tensor):
    """What `_compute_loss` reads, for one process and no accumulation."""
    coef = options.get("entropy_coef", 0.0)
    return types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, entropy, None),
        _metrics={"train": collections.defaultdict(list)},
        _entropy_bonus_enabled=coef != 0.0,
        accelerator=types.SimpleNamespace(
            num_processes=1,
            sync_gradients=True,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
        ),
        args=types.SimpleNamespace(
            delta=options.get("delta"),
            use_bias_correction_kl=False,
            steps_per_generation=1,
        ),
        aux_loss_enabled=False,
        beta=options.get("beta", 0.0),
        current_gradient_accumulation_steps=1,
        entropy_coef=coef,
        epsilon_high=options.get("epsilon_high", 0.2),
        epsilon_low=options.get("epsilon", 0.2),
        importance_sampling_level=options.get("level", "token"),
        loss_type=options.get("loss_type", "grpo"),
        max_completion_length=MAX_LENGTH,
        model=types.SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_adaptive_entropy=False,
        use_vllm="sampler_cap" in options,
        vllm_importance_sampling_correction=True,
    )


def run_case(options: dict, arrays: dict[str, torch.Tensor]) -> dict:
    """Loss, gradients and metrics of one case."""
    logp = arrays["logp"].clone().requires_grad_()
    entropy = arrays["entropy"].clone().requires_grad_()
    mask = arrays["mask"].long()
    inputs = {
        "prompt_ids": torch.zeros(SEQUENCES, 1, dtype=torch.long),
        "prompt_mask": torch.ones(SEQUENCES, 1, dtype=torch.long),
        "completion_ids": torch.zeros(SEQUENCES, TOKENS, dtype=torch.long),
        "completion_mask": mask,
        "advantages": arrays["advantages"],
        "ref_per_token_logps": arrays["ref_logp"],
        "num_items_in_batch": mask.sum(),
    }
    if not options.get("on_policy"):
        inputs["old_per_token_logps"] = arrays["old_logp"]
    if "sampler_cap" in options:
        ratio = torch.exp(arrays["old_logp"] - arrays["sampler_logp"])
        inputs["importance_sampling_ratio"] = ratio.clamp(max=options["sampler_cap"])
    trainer = make_trainer(options, logp, entropy)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    entropy_grad = torch.zeros_like(entropy) if entropy.grad is None else entropy.grad
    return {
        "loss": loss.item(),
        "logp_grad": round_all(logp.grad),
        "entropy_grad": round_all(entropy_grad),
        "metrics": {name: x[0] for name, x in trainer._metrics["train"].items()},
    }


def round_all(array: torch.Tensor) -> list:
    return array.round(decimals=9).tolist()


def main() -> None:
    arrays = make_inputs()
    reference = {
        "trl": trl.__version__,
        "torch": torch.__version__,
        "inputs": {
            name: (x if x.dtype == torch.bool else x.round(decimals=3)).tolist()
            for name, x in arrays.items()
        },
        "cases": {
            name: {
                "arguments": arguments,
                "on_policy": bool(options.get("on_policy")),
                **run_case(options, arrays),
            }
            for name, (options, arguments) in CASES.items()
        },
    }
    path = pathlib.Path(__file__).with_name("trl_reference.json")
    path.write_text(json.dumps(reference, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
