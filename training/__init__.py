"""Training: one story per model, one loop for all of them. `python -m training digit`."""
