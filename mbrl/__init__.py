"""Components of model-based reinforcement learning: pure functions around one `MDP`."""
