"""Where compiled programs are kept."""

import warnings

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as of_jax

from l2w_jax.run import compile_cache


@pytest.fixture
def unset(monkeypatch):
  """A process in which nobody has chosen a folder yet."""
  was = jax.config.jax_compilation_cache_dir
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  jax.config.update("jax_compilation_cache_dir", None)
  yield
  jax.config.update("jax_compilation_cache_dir", was)


def test_the_users_cache_folder_is_the_default(unset, monkeypatch, tmp_path):
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setenv("HOME", str(tmp_path))
  folder = compile_cache.enable()
  assert folder == tmp_path / ".cache" / "l2w_jax" / "jax" and folder.is_dir()
  assert jax.config.jax_compilation_cache_dir == str(folder)


def test_xdg_cache_home_moves_it(unset, monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  assert compile_cache.enable() == tmp_path / "xdg" / "l2w_jax" / "jax"


def test_a_folder_chosen_before_stays(unset, monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
  assert compile_cache.enable() == tmp_path / "mine"
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")


def test_an_empty_variable_keeps_nothing(unset, monkeypatch, tmp_path):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert compile_cache.enable() is None
  assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_done_without(unset, monkeypatch, tmp_path):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  assert compile_cache.enable() is None
  assert not jax.config.jax_compilation_cache_dir


def test_a_user_without_a_home_keeps_nothing(unset, monkeypatch):
  def nobody():
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setattr(compile_cache.pathlib.Path, "home", nobody)
  assert compile_cache.enable() is None


@pytest.mark.parametrize("data", [b"", np.random.default_rng(0).bytes(500)])
def test_a_damaged_entry_is_replaced_without_a_word(
  unset, monkeypatch, tmp_path, data, capsys
):
  def compile_it():
    of_jax.reset_cache()
    return float(jax.jit(lambda x: x + 7)(np.float32(1)))

  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  seconds = jax.config.jax_persistent_cache_min_compile_time_secs
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  try:
    with warnings.catch_warnings():
      folder = compile_cache.enable()
      assert compile_it() == 8
      (path,) = folder.glob("*-cache")
      path.write_bytes(data)
      assert compile_it() == 8 and path.stat().st_size > 1000
  finally:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    of_jax.reset_cache()
  assert not capsys.readouterr().err
