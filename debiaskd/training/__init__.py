"""What `debiaskd train` does: stages, steps, checkpoints, logs. Recipes say what; this says how."""
