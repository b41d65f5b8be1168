"""The whole YAML: `Job` adds the sections `sweep`, `launch` and `rollout` to a run's config.

It imports `sae_train.config` and nothing else of this package.
"""
