"""Numbers and their intervals: win rates, reward metrics, checkpoint selection, loss on text, tasks, labelers."""
