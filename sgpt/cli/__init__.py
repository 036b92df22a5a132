"""The command line: Hydra and OmegaConf are imported here and nowhere else."""
