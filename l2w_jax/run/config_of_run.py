"""The config of a run directory as a config file: `config_of_run.py:WORKDIR`.

So `--config.evaluate.target=…` has a config to override where `--config` is left
out, see `command.define_config`.
"""

from ml_collections import ConfigDict

from l2w_jax import config as config_lib
from l2w_jax.run import directory, files


def get_config(workdir: str) -> ConfigDict:
  """The config of a run, for the devices that are here.

  Where config.json is lost, it is that of the checkpoints.

  Raises:
    ValueError: no checkpoint has it, either, or it is broken.
  """
  path = files.path(workdir)
  if (path / "config.json").exists():
    config = directory.read_config(path)
  else:
    values = directory.config_of_checkpoints(path)
    if values is None:
      raise ValueError(
        f"{path / 'config.json'} is missing, and no checkpoint tells what it was; "
        "give --config=NAME"
      )
    config = config_lib.validate(config_lib.from_dict(values))
  if config.sync == "local":
    config.num_devices = 0  # those that trained it need not be here
  return config
