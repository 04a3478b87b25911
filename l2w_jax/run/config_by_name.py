"""What a name stands for as a config file: `config_by_name.py:digits:uniform`.

The flag --config reads files that define get_config(ARGUMENT) and nothing else, so
`command` turns --config=NAME into this file with the name for its argument.
"""

from ml_collections import ConfigDict

from l2w_jax import config as config_lib


def get_config(name: str) -> ConfigDict:
  """The config of `l2w_jax.config.read_config`, overrides to come."""
  return config_lib.read_config(name)
