"""Where compiled programs are kept."""

import jax
import pytest

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
