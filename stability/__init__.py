"""Remedies that keep RL runs stable: advantages, weights, masks, losses and monitors."""
