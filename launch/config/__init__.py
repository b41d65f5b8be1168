"""The whole YAML: a run's config, a sweep, and where stages run.

It adds `sweep` and `launch` to `sae_train`'s config.
"""
