"""What TRL calls the fields of the configuration, for whoever comes with its names."""

# Names of TRL's GRPOConfig, and the fields that stand for them; docs/trl.md has all.
TRL_NAMES = {
    "model_name_or_path": "model",
    "output_dir": "run_dir",
    "max_steps": "steps",
    "per_device_train_batch_size": "prompts_per_step",
    "per_device_eval_batch_size": "eval_batch_size",
    "num_generations": "group_size",
    "num_iterations": "updates_per_rollout",
    "max_prompt_length": "max_prompt_tokens",
    "max_completion_length": "max_new_tokens",
    "eval_steps": "eval_every",
    "beta": "objective.kl_coef",
    "epsilon": "objective.clip_low",
    "epsilon_high": "objective.clip_high",
    "loss_type": "objective.aggregation",
    "scale_rewards": "objective.advantage",
    "reward_weights": "rewards.weights",
    "save_steps": "checkpoint.every",
    "logging_steps": "report.log_every",
    "report_to": "report.wandb",
}

# Where the rest is explained, as the end of a message.
TRL_PAGE = "docs/trl.md says what TRL's options are here"
