"""The paper's claims in miniature: `python -m benchmarks.evidence`."""
