"""Policy gradient methods in PyTorch: REINFORCE, A2C, NPG, TRPO and PPO."""

__version__ = "0.1.0"
