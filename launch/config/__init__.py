"""The whole YAML: `Job` adds the sections `sweep` and `launch` to a run's config.

It imports `sae_train.config` and nothing else of this package.
"""
