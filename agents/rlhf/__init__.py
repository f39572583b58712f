"""Language models from human feedback: supervised, reward, PPO and direct preference stages."""
