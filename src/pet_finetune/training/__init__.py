"""Training: loss, metrics, schedule, one step, the loop, and going on where a run stopped."""
