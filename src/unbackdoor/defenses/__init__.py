"""Defenses: one file per method. Each sees (model, clean samples, generator) and nothing else."""
