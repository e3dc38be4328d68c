"""What the tests of the reports share: a run directory that was made up."""

import importlib.util
import pathlib

import pytest


@pytest.fixture(scope="session")
def synthetic():
    """The module `synthetic.py`: hostile texts and a writer of runs."""
    path = pathlib.Path(__file__).with_name("synthetic.py")
    spec = importlib.util.spec_from_file_location("reporting_synthetic", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
