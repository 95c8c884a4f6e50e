"""On top of the stages: report, figures, benchmark, small results, the tiny Stable Diffusion."""
