"""Pure functions on tensors, one per equation of the paper."""
