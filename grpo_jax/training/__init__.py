"""From a configuration to trained parameters: step, checkpoints, evaluation, loop."""
