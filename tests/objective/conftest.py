"""What the tests of the objective share: its float64 mirror, a switch for checks."""

import importlib.util
import pathlib

import jaxtyping
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
