"""Stages handed to Slurm or to Kubernetes."""
