"""Set-up of the suite: shapes are checked, and compiled programs are kept."""
import os
import pathlib

# Before JAX is imported. Programs compiled by one test, or one run of the
# suite, serve the others and the processes that tests start.
ROOT = pathlib.Path(__file__).parents[1]
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

from beartype import BeartypeConf, beartype  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# An int passes for a float, as PEP 484 has it.
check_types = beartype(conf=BeartypeConf(is_pep484_tower=True))
# Every annotation of the package is checked at each call, shapes included.
install_import_hook("l2w_jax", "conftest.check_types")
