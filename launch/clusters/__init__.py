"""Batch scripts and manifests from a config, and their submission to Slurm and Kubernetes.

It imports `launch.config`, `launch.sweep` and `launch.run_state`; `launch.commands` starts it.
"""
