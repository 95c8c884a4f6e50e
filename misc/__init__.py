"""What stands on the stages: report, figures, benchmark, checks, and the tiny Stable Diffusion."""
