"""The activation store and `batch(step)`: manifest, order, reader, writer.

The room owns the store's format and the order of its rows, a pure function of integers, so that
resuming needs the step alone. It imports `text`, `gemma.taps` and the rooms before them; models and
weights it knows by their fingerprint.
"""
