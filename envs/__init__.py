"""Environments: on-device MDPs, Gymnasium environments as record streams, adapters."""

from envs.functional import func_env_to_mdp, mdp_to_env, mdp_to_func_env, mdp_to_vector_env
from envs.host import HostEnv
from envs.registry import make
from envs.vector import from_vector_env

__all__ = [
    "HostEnv",
    "from_vector_env",
    "func_env_to_mdp",
    "make",
    "mdp_to_env",
    "mdp_to_func_env",
    "mdp_to_vector_env",
]
