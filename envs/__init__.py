"""Environments: on-device MDPs, Gymnasium environments as record streams, adapters."""

from envs.host import HostEnv
from envs.registry import make
from envs.vector import from_vector_env

__all__ = ["HostEnv", "from_vector_env", "make"]
