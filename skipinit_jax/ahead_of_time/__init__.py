"""What a training step would cost on TPUs that are not here."""
