"""What the commands in `trainers` and `serving` share: a quiet start, flags, mistakes in one line; and the demo."""
