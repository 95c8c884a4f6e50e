"""Stages 1 and 2: real images -> prototypes -> synthetic images."""
