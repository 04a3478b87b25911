"""What a run stands on: devices, processes, files, progress, errors."""
