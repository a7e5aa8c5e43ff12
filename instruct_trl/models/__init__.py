"""Reward scoring and the value model."""
