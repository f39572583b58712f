"""Simulators that run on the device: one `MDP` factory per file."""
