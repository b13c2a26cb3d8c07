"""What runs a sweep's runs: slots of this box, Slurm, Ray."""
