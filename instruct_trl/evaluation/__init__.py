"""Win rates, checkpoint selection, the report and its pictures."""
