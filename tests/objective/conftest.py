"""What the tests of the objective share: its float64 mirror, a switch for checks."""

import importlib.util
import pathlib

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest


@pytest.fixture(scope="session")
def mirror():
    """The formulas once more, in NumPy and float64."""
    path = pathlib.Path(__file__).with_name("mirror.py")
    spec = importlib.util.spec_from_file_location("objective_mirror", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def without_shape_checks():
    """Leave wrong arguments to the functions' own errors, as outside the test run."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def random_group():
    """A function from a seed to the arrays of a few groups."""

    def make(seed=0, shape=(2, 4, 5)):
        """Log-probabilities of several policies, a mask of lengths 0 to T, rewards."""
        generator = np.random.default_rng(seed)
        logp = -generator.uniform(0.1, 3.0, shape)
        lengths = generator.integers(0, shape[-1] + 1, shape[:-1])
        lengths.flat[0], lengths.flat[1] = shape[-1], 0
        arrays = {
            "logp": logp,
            "old_logp": logp + 0.3 * generator.normal(size=shape),
            "ref_logp": logp + 0.5 * generator.normal(size=shape),
            "sampler_logp": logp + 0.3 * generator.normal(size=shape),
            "entropy": generator.uniform(0.1, 2.0, shape),
            "rewards": generator.normal(size=shape[:-1]),
        }
        out = {name: jnp.array(x, jnp.float32) for name, x in arrays.items()}
        return out | {"mask": jnp.array(np.arange(shape[-1]) < lengths[..., None])}

    return make
