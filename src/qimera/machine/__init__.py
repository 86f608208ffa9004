"""What the machine gives: devices, processes, files, checkpoints, random numbers, progress."""
