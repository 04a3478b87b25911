"""The config of a run directory as a config file: `config_of_run.py:WORKDIR`.

So `--config.evaluate.target=…` has a config to override where `--config` is left
out, see `command.define_config`.
"""

from ml_collections import ConfigDict

from l2w_jax.run import directory, files


def get_config(workdir: str) -> ConfigDict:
  """The config that is in the run directory, for the devices that are here."""
  config = directory.read_config(files.path(workdir))
  if config.sync == "local":
    config.num_devices = 0  # those that trained it need not be here
  return config
