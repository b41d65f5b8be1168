"""The `sae` command: reads one YAML and starts its stages here, on Slurm or on Kubernetes."""
