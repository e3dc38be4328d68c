"""Compiled programs are kept for this user, and for Pythons that can read them."""

import os
import sys
import types

import pytest
from jax._src import compilation_cache

from grpo_jax.parallel import compile_cache


@pytest.fixture
def no_choice(monkeypatch):
    # Set first: what the program sets is then taken back after the test.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")


def test_compiled_programs_are_kept_for_this_user_alone(
    monkeypatch, tmp_path, no_choice
):
    folder = tmp_path / "grpo_jax" / "compiled"
    folder.mkdir(parents=True, mode=0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_cache.use_compile_cache()
    chosen = folder / compile_cache._cache_name()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(chosen)
    assert chosen.is_dir() and folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("chosen", ["", "/somewhere/else"])
def test_a_cache_that_the_user_chose_or_turned_off_stays(monkeypatch, tmp_path, chosen):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", chosen)
    compile_cache.use_compile_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == chosen
    assert not list(tmp_path.iterdir())


def test_a_home_that_cannot_be_written_means_no_cache(monkeypatch, tmp_path, no_choice):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compile_cache.use_compile_cache()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def without(monkeypatch, *modules):
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed


@pytest.mark.parametrize("compressor", ["compression.zstd", "zstandard", "zlib"])
def test_the_name_tells_the_python_and_the_compressor(monkeypatch, compressor):
    without(monkeypatch, "compression.zstd", "zstandard")
    monkeypatch.setitem(sys.modules, "compression", types.ModuleType("compression"))
    monkeypatch.setitem(sys.modules, compressor, types.ModuleType(compressor))
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert compile_cache._cache_name() == f"python{python}-{compressor}"


def test_the_compressor_is_the_one_that_jax_takes():
    packed = compilation_cache.compress_executable(b"program")
    by_zstd = packed.startswith(b"\x28\xb5\x2f\xfd")
    assert by_zstd == ("zst" in compile_cache._cache_name())
