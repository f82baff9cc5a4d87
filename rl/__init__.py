"""The RL loop behind `trimtab-rl`."""
