"""What is done with a finished run: evaluate, explain, probe."""
