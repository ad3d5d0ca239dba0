"""SLURM jobs: a template filled in, what the cluster has, what is submitted and chained."""
