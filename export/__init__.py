"""Export: a trained checkpoint to a proven version in the model repository. `python -m export digit`."""
