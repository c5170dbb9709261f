"""Training live models: freezing, initialisation, parameter groups, loading, gradients and optimizer state."""
