"""Rollouts, rewards, losses and updates: what rejection sampling and PPO are made of."""
