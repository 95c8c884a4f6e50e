"""Stage 3, training-time matching: teachers and their soft labels."""
