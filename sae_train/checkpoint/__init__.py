"""Training state on disk: saved, checked, restored, refused if it belongs to another run.

It imports `step` for the state's shape and `runs` for the folder, never the training loop.
"""
