"""Strict JAX settings and eight virtual CPU devices for every test."""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
# A private cache keeps compilation, the cost of a JAX test suite, out of the second run.
_cache = pathlib.Path(tempfile.gettempdir()) / f"grpo_jax_test_cache_{os.getuid()}"
_cache.mkdir(mode=0o700, exist_ok=True)
jax.config.update("jax_compilation_cache_dir", str(_cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
