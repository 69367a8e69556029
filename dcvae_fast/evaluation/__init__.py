"""What a trained model is worth. Evaluation sees a `DCVAE` and images: nothing of training."""
