"""What `python -m misc.benchmark` is made of."""
