"""One stage of a run: loop, learner, schedule, selection, checkpoints, logs."""
