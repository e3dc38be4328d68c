"""The objective once more, in NumPy and float64, written from the formulas alone.

Loops over groups and sequences, no masking tricks: what is not in a group or not in a
sequence is cut away before the formula is applied.
"""

import numpy as np


def token_logprobs(logits, tokens, temperature=1.0):
    probs = softmax(logits / temperature)
    return np.log(np.take_along_axis(probs, tokens[..., None], axis=-1)[..., 0])


def token_entropy(logits, temperature=1.0):
    probs = softmax(logits / temperature)
    return -np.sum(probs * np.log(probs), axis=-1)


def softmax(x):
    mass = np.exp(x - x.max(axis=-1, keepdims=True))
    return mass / mass.sum(axis=-1, keepdims=True)


def per_group(function, rewards, valid):
    out = np.zeros(rewards.shape)
    for index in np.ndindex(rewards.shape[:-1]):
        kept = valid[index]
        if kept.any():
            out[index][kept] = function(rewards[index][kept])
    return out


def group_softmax_weights(rewards, valid, temperature=1.0):
    return per_group(lambda r: softmax(r / temperature), rewards, valid)


def softmax_advantages(rewards, valid, temperature=1.0):
    return per_group(lambda r: len(r) * softmax(r / temperature) - 1.0, rewards, valid)


def standardized_advantages(rewards, valid, eps=1e-4):
    def standardize(r):
        if len(r) == 1:
            return np.zeros(1)
        return (r - r.mean()) / (r.std(ddof=1) + eps)

    return per_group(standardize, rewards, valid)


def batch_standardized_advantages(rewards, valid, eps=1e-4):
    std = rewards[valid].std(ddof=1)
    return per_group(lambda r: (r - r.mean()) / (std + eps), rewards, valid)


def centered_advantages(rewards, valid):
    return per_group(lambda r: r - r.mean(), rewards, valid)


def leave_one_out_advantages(rewards, valid):
    def leave_one_out(r):
        if len(r) == 1:
            return np.zeros(1)
        others = [np.delete(r, i).mean() for i in range(len(r))]
        return r - np.array(others)

    return per_group(leave_one_out, rewards, valid)


def overlong_penalty(lengths, max_length, cache):
    def one(length):
        if length <= max_length - cache:
            return 0.0
        if length <= max_length:
            return (max_length - cache - length) / cache
        return -1.0

    return np.vectorize(one)(lengths)


def kl_estimate(logp, ref_logp, kind):
    ratio = np.exp(ref_logp - logp)
    return {
        "k1": logp - ref_logp,
        "k2": 0.5 * (logp - ref_logp) ** 2,
        "k3": np.expm1(ref_logp - logp) - np.log(ratio),
    }[kind]


def clipped_surrogate(log_ratio, advantages, clip_low, clip_high, dual_clip=None):
    """By cases rather than by minimum: is the ratio past the bound that A pushes to?"""
    ratio = np.exp(log_ratio)
    a = np.broadcast_to(advantages[..., None], ratio.shape)
    up = np.where(ratio > 1 + clip_high, 1 + clip_high, ratio)
    down = np.where(ratio < 1 - clip_low, 1 - clip_low, ratio)
    if dual_clip is not None:
        down = np.where(down > dual_clip, dual_clip, down)
    return -np.where(a >= 0, up, down) * a


def cispo_surrogate(logp, log_ratio, advantages, max_weight):
    ratio = np.exp(log_ratio)
    weight = np.where(ratio > max_weight, max_weight, ratio)
    return -weight * advantages[..., None] * logp


def importance_correction(old_logp, sampler_logp, cap):
    ratio = np.exp(old_logp) / np.exp(sampler_logp)
    return np.where(ratio > cap, cap, ratio)


def log_importance_ratio(logp, old_logp, mask, level):
    out = np.zeros(logp.shape)
    for index in np.ndindex(logp.shape[:-1]):
        kept = mask[index]
        if kept.any():
            difference = logp[index][kept] - old_logp[index][kept]
            out[index][kept] = difference if level == "token" else difference.mean()
    return out


def aggregate(values, mask, mode, max_length=None):
    """The mean itself; 0 where no sequence has a token."""
    sequences = [
        values[index][mask[index]]
        for index in np.ndindex(values.shape[:-1])
        if mask[index].any()
    ]
    if not sequences:
        return 0.0
    sums = [s.sum() for s in sequences]
    return {
        "sequence_mean": lambda: np.mean([s.mean() for s in sequences]),
        "sequence_sum": lambda: np.mean(sums),
        "token_mean": lambda: np.concatenate(sequences).mean(),
        "fixed_length": lambda: (
            np.sum(sums) / (len(sums) * (max_length or values.shape[-1]))
        ),
    }[mode]()


def weighted_likelihood_loss(logp, mask, weights, reduce="sum"):
    losses = []
    for n in range(logp.shape[0]):
        loss = 0.0
        for g in range(logp.shape[1]):
            tokens = logp[n, g][mask[n, g]]
            if tokens.size:
                loss -= weights[n, g] * getattr(tokens, reduce)()
        losses.append(loss)
    return np.mean(losses)


def grpo_loss(
    logp,
    mask,
    advantages,
    old_logp=None,
    ref_logp=None,
    sampler_logp=None,
    entropy=None,
    surrogate="clip",
    ratio_level="token",
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
    cispo_max_weight=None,
    kl_coef=0.0,
    kl_estimator="k3",
    entropy_coef=0.0,
    sampler_correction_cap=None,
    aggregation="sequence_mean",
    max_length=None,
):
    old_logp = logp if old_logp is None else old_logp
    log_ratio = log_importance_ratio(logp, old_logp, mask, ratio_level)
    if surrogate == "clip":
        values = clipped_surrogate(
            log_ratio, advantages, clip_low, clip_high, dual_clip
        )
    elif surrogate == "cispo":
        values = cispo_surrogate(logp, log_ratio, advantages, cispo_max_weight)
    else:
        values = -advantages[..., None] * logp
    if sampler_correction_cap is not None:
        values = values * importance_correction(
            old_logp, sampler_logp, sampler_correction_cap
        )
    if kl_coef:
        values = values + kl_coef * kl_estimate(logp, ref_logp, kl_estimator)
    if entropy_coef:
        values = values - entropy_coef * entropy
    return aggregate(values, mask, aggregation, max_length)
