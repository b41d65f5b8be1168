"""Training state on disk: saved, checked, restored, refused where it is of another run.

It imports `step` for the state's shape, never the loop.
"""
