"""What a training step would cost on TPUs or GPUs that are not here."""
