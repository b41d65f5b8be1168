"""The store of activations and `batch(step)`: manifest, order, reader, writer.

Order is a pure function of integers, so that resuming needs the step alone.
"""
