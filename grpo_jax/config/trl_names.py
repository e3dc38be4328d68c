"""TRL's names for the fields of the configuration."""

# Names in TRL's GRPOConfig -> our fields; docs/trl.md has all of them.
TRL_NAMES = {
    "model_name_or_path": "model",
    "output_dir": "run_dir",
    "max_steps": "steps",
    "num_train_epochs": "steps",
    # Both count sequences; what an update learns from is set by prompts_per_step.
    "per_device_train_batch_size": "microbatch_size",
    "gradient_accumulation_steps": "prompts_per_step",
    "steps_per_generation": "minibatches",
    "per_device_eval_batch_size": "eval_batch_size",
    "num_generations": "group_size",
    "num_iterations": "updates_per_rollout",
    "max_prompt_length": "max_prompt_tokens",
    "max_completion_length": "max_new_tokens",
    "eval_strategy": "eval_every",
    "eval_steps": "eval_every",
    "beta": "objective.kl_coef",
    "epsilon": "objective.clip_low",
    "epsilon_high": "objective.clip_high",
    "delta": "objective.dual_clip",
    "importance_sampling_level": "objective.ratio_level",
    "mask_truncated_completions": "objective.mask_truncated",
    "sync_ref_model": "objective.reference_every",
    "ref_model_sync_steps": "objective.reference_every",
    "loss_type": "objective.aggregation",
    "scale_rewards": "objective.advantage",
    "vllm_importance_sampling_clip_max": "objective.sampler_correction_cap",
    "reward_weights": "rewards.weights",
    "max_tool_calling_iterations": "environments.max_tool_calling_iterations",
    "adam_beta1": "optimizer.b1",
    "adam_beta2": "optimizer.b2",
    "lr_scheduler_type": "optimizer.schedule",
    "gradient_checkpointing": "remat",
    "bf16": "compute_dtype",
    "metric_for_best_model": "checkpoint.keep_best",
    "greater_is_better": "checkpoint.best_mode",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "logging_steps": "report.log_every",
    "log_completions": "report.completions_every",
    "report_to": "report.wandb",
}

# Where all options are explained; ends a message.
TRL_PAGE = "docs/trl.md says what TRL's options are here"
