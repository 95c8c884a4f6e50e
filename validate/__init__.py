"""Stage 4: students trained on synthetic images and soft labels, tested on real images."""
