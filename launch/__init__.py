"""The `sae` command: reads one YAML and starts its stages here, on Slurm or on Kubernetes.

It imports both other packages and is imported by neither. It contains no maths.
"""
