"""The training loop and its cohort: runs that read the same rows step side by side.

It joins the store, the step and the checkpoints.
"""
