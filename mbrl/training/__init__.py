"""Drivers, evaluation, checkpoints and logs: the only part of `mbrl` that does I/O."""
