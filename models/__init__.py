"""Pure architectures and what a trained model can become."""
