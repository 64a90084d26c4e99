"""Training: the state, the step, evaluation, checkpoints, metrics and the loop over them."""
