"""Training: what is minimised, on which images, and the loop around it."""
