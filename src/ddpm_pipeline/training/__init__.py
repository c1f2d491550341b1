"""Training: options, model presets, conditions, objectives, batches, updates, checkpoints, and the loop."""
