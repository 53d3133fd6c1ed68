"""What all reports share: figures with units, files that are written whole, and pages that need nothing else."""
