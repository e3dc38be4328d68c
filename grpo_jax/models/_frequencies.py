"""How rotary embeddings are stretched beyond the length that they were trained with.

Each function returns the h/2 frequencies of one kind of scaling from the plain ones,
w_i = theta^(-2i/h), in float64.
"""

import math

import numpy as np


def llama3(
    frequencies: np.ndarray,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> np.ndarray:
    """Slow pairs divided by the factor, fast ones kept, others between.

    Slow pairs have a wavelength above original/low_freq_factor, fast ones one below
    original/high_freq_factor (Llama 3.1, https://arxiv.org/abs/2407.21783, section
    3.4.3).
    """
    # turns: how often the pair rotates within the context it was trained on.
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)
    smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return frequencies * (smooth + (1.0 - smooth) / factor)


def yarn(
    frequencies: np.ndarray,
    theta: float,
    *,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float,
    beta_slow: float,
) -> np.ndarray:
    """Pairs that turn more than beta_fast times kept, the slowest divided by factor.

    Between them the share that is divided grows linearly with the pair's index, which
    is rounded outwards (Peng et al. 2023, https://arxiv.org/abs/2309.00071, section
    3.2).
    """
    size = 2 * len(frequencies)

    def index(turns: float) -> float:
        # Of the pair that turns so often within the trained length.
        ratio = original_max_position_embeddings / (2 * math.pi * turns)
        return size * math.log(ratio) / (2 * math.log(theta))

    first = max(math.floor(index(beta_fast)), 0)
    last = min(math.ceil(index(beta_slow)), size - 1)
    # One step in place of a ramp without width.
    width = 0.001 if first == last else last - first
    divided = np.clip((np.arange(size // 2) - first) / width, 0.0, 1.0)
    return frequencies * (1.0 - divided + divided / factor)


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies queries and keys by: 0.1 mscale ln(factor) + 1.

    Peng et al. 2023, equation 22. No stretching, factor 1 or less, is 1.
    """
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
