"""Models: a network and its `MDP`."""
