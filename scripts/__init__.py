"""What the stage scripts stand on: the two diffusers pipelines, ranks, seeds, files and
manifests."""
